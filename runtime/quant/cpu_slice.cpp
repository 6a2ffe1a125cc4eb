#include "runtime/quant/cpu_slice.h"

#include <tbb/blocked_range.h>
#include <tbb/parallel_for.h>

#include <algorithm>
#include <cassert>
#include <cmath>
#include <string>

#include "runtime/error.h"

namespace lighter {
namespace {

constexpr int64_t kRowsAtOnce =
    64;  // of a matrix: their results for some tokens stay in the first-level cache
constexpr int64_t kMostTokens = CpuSliceKernel::kMostTokens;  // the stack holds results of as many

cpu_kernels::Kernels kernels_of(CpuPath path) {
#if defined(__x86_64__)
  if (path == CpuPath::avx2) return cpu_kernels::avx2_kernels();
  if (path == CpuPath::avx512_vnni) return cpu_kernels::avx512_kernels();
#else
  (void)path;
#endif
  return cpu_kernels::scalar_kernels();
}

cpu_kernels::Matrix matrix_of(const PackedSliceLayout& layout, SliceMatrix which, const std::byte* slice) {
  const PackedMatrix& matrix = layout[which];
  const auto halves = [&](uint64_t at) { return reinterpret_cast<const uint16_t*>(slice + at); };
  return {reinterpret_cast<const uint8_t*>(slice + matrix.values_at), halves(matrix.scales_at),
          layout.encoding == SliceEncoding::int4 ? halves(matrix.minimums_at) : nullptr};
}

float silu(float value) {
  return value / (1.0f + std::exp(-value));
}

void check_tokens(int64_t tokens) {
  if (tokens <= kMostTokens) return;
  throw CapacityError("a step of the CPU's slice kernel takes at most " + std::to_string(kMostTokens) +
                      " tokens, not " + std::to_string(tokens) + "; give them in turns");
}

// Calls body(begin, end) for ranges of [0, rows).
template <typename Body>
void for_rows(int64_t rows, CpuThreads threads, const Body& body) {
  if (threads == CpuThreads::calling) {
    body(int64_t{0}, rows);
    return;
  }
  constexpr int64_t block = CpuSliceKernel::kRowBlock;
  const tbb::blocked_range<int64_t> blocks(0, rows / block);
  tbb::parallel_for(blocks, [&](const auto& range) { body(range.begin() * block, range.end() * block); });
}

}  // namespace

std::vector<CpuPath> supported_cpu_paths() {
  std::vector<CpuPath> paths = {CpuPath::scalar};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    paths.push_back(CpuPath::avx2);
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
    paths.push_back(CpuPath::avx512_vnni);
  }
#endif
  return paths;
}

CpuSliceKernel::CpuSliceKernel(SliceEncoding encoding, int64_t hidden, int64_t width)
    : CpuSliceKernel(encoding, hidden, width, supported_cpu_paths().back()) {}

CpuSliceKernel::CpuSliceKernel(SliceEncoding encoding, int64_t hidden, int64_t width, CpuPath path)
    : layout_(packed_slice_layout(encoding, hidden, width)) {
  const auto paths = supported_cpu_paths();
  if (std::find(paths.begin(), paths.end(), path) == paths.end()) {
    throw ConfigError("this processor has no " + std::string(path_name(path)) + "; its best is " +
                      std::string(path_name(paths.back())));
  }
  const auto kernels = kernels_of(path);
  kernel_ = encoding == SliceEncoding::int8 ? kernels.int8 : kernels.int4;
}

void CpuSliceKernel::accumulate(const std::byte* slice, const float* x, int64_t tokens, float* sum,
                                CpuScratch& scratch, CpuThreads threads) const {
  const auto [hidden, width] = std::pair(layout_.hidden, layout_.width);
  for (int64_t first = 0; first < tokens; first += kMostTokens) {
    const int64_t count = std::min(kMostTokens, tokens - first);
    if (static_cast<int64_t>(scratch.hidden_values.size()) < count * width) {
      scratch.hidden_values.resize(count * width);
    }
    float* values = scratch.hidden_values.data();
    quantize_input(x + first * hidden, count, scratch.input);
    for_rows(width, threads,
             [&](int64_t begin, int64_t end) { gate_up(slice, scratch.input, begin, end, values); });
    quantize_hidden(values, count, scratch.hidden);
    for_rows(hidden, threads, [&](int64_t begin, int64_t end) {
      down(slice, scratch.hidden, begin, end, sum + first * layout_.hidden);
    });
  }
}

void CpuSliceKernel::quantize_input(const float* x, int64_t tokens, QuantizedActivations& input) const {
  check_tokens(tokens);
  input.assign(layout_.encoding, x, tokens, layout_.hidden);
}

void CpuSliceKernel::quantize_hidden(const float* values, int64_t tokens,
                                     QuantizedActivations& hidden) const {
  check_tokens(tokens);
  hidden.assign(layout_.encoding, values, tokens, layout_.width);
}

void CpuSliceKernel::gate_up(const std::byte* slice, const QuantizedActivations& input, int64_t begin,
                             int64_t end, float* values) const {
  assert(begin % kRowBlock == 0 && end % kRowBlock == 0 && input.columns() == layout_.hidden);
  const auto gate = matrix_of(layout_, SliceMatrix::gate, slice);
  const auto up = matrix_of(layout_, SliceMatrix::up, slice);
  float gates[kMostTokens * kRowsAtOnce];
  float ups[kMostTokens * kRowsAtOnce];
  for (int64_t row = begin; row < end; row += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, end - row);
    kernel_(gate, input, row, rows, gates, kRowsAtOnce);
    kernel_(up, input, row, rows, ups, kRowsAtOnce);
    for (int64_t token = 0; token < input.tokens(); ++token) {
      float* to = values + token * layout_.width + row;
      for (int64_t i = 0; i < rows; ++i) {
        to[i] = silu(gates[token * kRowsAtOnce + i]) * ups[token * kRowsAtOnce + i];
      }
    }
  }
}

void CpuSliceKernel::down(const std::byte* slice, const QuantizedActivations& hidden, int64_t begin,
                          int64_t end, float* sum) const {
  assert(begin % kRowBlock == 0 && end % kRowBlock == 0 && hidden.columns() == layout_.width);
  const auto matrix = matrix_of(layout_, SliceMatrix::down, slice);
  float results[kMostTokens * kRowsAtOnce];
  for (int64_t row = begin; row < end; row += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, end - row);
    kernel_(matrix, hidden, row, rows, results, kRowsAtOnce);
    for (int64_t token = 0; token < hidden.tokens(); ++token) {
      float* to = sum + token * layout_.hidden + row;
      for (int64_t i = 0; i < rows; ++i) to[i] += results[token * kRowsAtOnce + i];
    }
  }
}

void cpu_accumulate(SliceEncoding encoding, int64_t hidden, int64_t width, const std::byte* slice,
                    const float* x, int64_t tokens, float* sum, CpuScratch& scratch, CpuThreads threads) {
  CpuSliceKernel(encoding, hidden, width).accumulate(slice, x, tokens, sum, scratch, threads);
}

}  // namespace lighter
