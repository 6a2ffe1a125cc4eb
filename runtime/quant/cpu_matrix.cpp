#include "runtime/quant/cpu_matrix.h"

#include <tbb/blocked_range.h>
#include <tbb/parallel_for.h>

#include <string>

#include "runtime/error.h"
#include "runtime/quant/cpu_kernels.h"
#include "runtime/quant/cpu_slice.h"

namespace lighter {

void cpu_matrix_product(SliceEncoding encoding, const PackedMatrix& matrix, const std::byte* data,
                        const float* x, int64_t tokens, float* out, QuantizedActivations& scratch) {
  if (tokens > kMostMatrixTokens) {
    throw CapacityError("a packed matrix is multiplied with at most " + std::to_string(kMostMatrixTokens) +
                        " tokens at a time on the CPU, not " + std::to_string(tokens));
  }
  const bool int4 = encoding == SliceEncoding::int4;
  const int64_t groups = matrix.columns / group_size(encoding);
  const auto halves = [&](uint64_t at) { return reinterpret_cast<const uint16_t*>(data + at); };
  const cpu_kernels::Matrix weights{reinterpret_cast<const uint8_t*>(data + matrix.values_at),
                                    halves(matrix.scales_at), int4 ? halves(matrix.minimums_at) : nullptr,
                                    value_bytes(encoding, matrix.columns), groups};
  scratch.assign(encoding, x, tokens, matrix.columns);
  const auto kernels = kernels_of(supported_cpu_paths().back());
  const auto kernel = int4 ? kernels.int4 : kernels.int8;
  constexpr int64_t block = cpu_kernels::kRowBlock;
  // A task of at least 64 KiB of weights is worth its start.
  const int64_t grain = std::max<int64_t>(1, (int64_t{64} << 10) / (block * weights.row_bytes));
  tbb::parallel_for(tbb::blocked_range<int64_t>(0, matrix.rows / block, grain), [&](const auto& range) {
    const int64_t begin = range.begin() * block;
    const int64_t count = range.end() * block - begin;
    const PrefetchRange ahead_range{weights.values + begin * weights.row_bytes,
                                    weights.row_bytes,
                                    weights.row_bytes,
                                    count,
                                    weights.scales + begin * groups,
                                    int4 ? weights.minimums + begin * groups : nullptr,
                                    0};
    PrefetchStream ahead(&ahead_range, &ahead_range + 1);
    ahead.ask_bytes(cpu_kernels::prefetch_distance(kernels, encoding, tokens, weights.row_bytes));
    kernel(weights, {scratch, nullptr, tokens, 0}, begin, count, out + begin, matrix.rows, ahead);
  });
}

}  // namespace lighter
