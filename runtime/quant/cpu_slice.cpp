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

// Of a matrix: their results for some tokens stay in the first-level cache.
constexpr int64_t kRowsAtOnce = 64;
constexpr int64_t kMostTokens = CpuSliceKernel::kMostTokens;  // the stack holds results of as many

// The columns of a matrix, all of them or some whole groups.
cpu_kernels::Matrix matrix_of(const PackedSliceLayout& layout, SliceMatrix which, const std::byte* slice,
                              int64_t first_column = 0) {
  const PackedMatrix& matrix = layout[which];
  const bool int4 = layout.encoding == SliceEncoding::int4;
  const int64_t first_group = first_column / group_size(layout.encoding);
  const auto halves = [&](uint64_t at) {
    return reinterpret_cast<const uint16_t*>(slice + at) + first_group;
  };
  return {
      reinterpret_cast<const uint8_t*>(slice + matrix.values_at) + value_bytes(layout.encoding, first_column),
      halves(matrix.scales_at), int4 ? halves(matrix.minimums_at) : nullptr,
      value_bytes(layout.encoding, matrix.columns), matrix.columns / group_size(layout.encoding)};
}

// Rows [begin, end) of it, `bytes` of each.
PrefetchRange range_of(const cpu_kernels::Matrix& matrix, int64_t bytes, int64_t begin, int64_t end) {
  const int64_t scales = begin * matrix.row_groups;
  const int64_t head = std::min(end - begin, cpu_kernels::kRowBlock) * matrix.row_groups * 2;
  return {matrix.values + begin * matrix.row_bytes,
          bytes,
          matrix.row_bytes,
          end - begin,
          matrix.scales + scales,
          matrix.minimums == nullptr ? nullptr : matrix.minimums + scales,
          head};
}

PrefetchStream primed(const PrefetchRange* begin, const PrefetchRange* end, int64_t bytes) {
  PrefetchStream stream(begin, end);
  stream.ask_bytes(bytes);
  return stream;
}

// Calls body(first, count, ahead) for tokens in turns; the weights are new to the first of them only.
template <typename Body>
void in_turns(int64_t tokens, PrefetchStream& ahead, const Body& body) {
  PrefetchStream nothing;
  for (int64_t first = 0; first < tokens; first += kMostTokens) {
    body(first, std::min(kMostTokens, tokens - first), first == 0 ? ahead : nothing);
  }
}

cpu_kernels::Tokens part(const cpu_kernels::Tokens& x, int64_t first, int64_t count) {
  return {x.rows, x.index, count, x.first + first};
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
  constexpr int64_t block = cpu_kernels::kRowBlock;
  const tbb::blocked_range<int64_t> blocks(0, rows / block);
  tbb::parallel_for(blocks, [&](const auto& range) { body(range.begin() * block, range.end() * block); });
}

}  // namespace

cpu_kernels::Kernels kernels_of(CpuPath path) {
#if defined(__x86_64__)
  if (path == CpuPath::avx2) return cpu_kernels::avx2_kernels();
  if (path == CpuPath::avx512_vnni) return cpu_kernels::avx512_kernels();
  if (path == CpuPath::amx) return cpu_kernels::amx_kernels();
#else
  (void)path;
#endif
  return cpu_kernels::scalar_kernels();
}

std::vector<CpuPath> supported_cpu_paths() {
  std::vector<CpuPath> paths = {CpuPath::scalar};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    paths.push_back(CpuPath::avx2);
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
    paths.push_back(CpuPath::avx512_vnni);
    if (cpu_kernels::amx_permitted()) paths.push_back(CpuPath::amx);
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
  kernels_ = kernels_of(path);
  kernel_ = encoding == SliceEncoding::int8 ? kernels_.int8 : kernels_.int4;
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
  const cpu_kernels::Tokens x{input, nullptr, input.tokens()};
  const auto gate = matrix_of(layout_, SliceMatrix::gate, slice);
  const auto up = matrix_of(layout_, SliceMatrix::up, slice);
  const int64_t distance = prefetch_distance(input.tokens(), cpu_kernels::kPrefetchBytes);
  for (int64_t row = begin; row < end; row += kRowsAtOnce) {
    const int64_t last = std::min(end, row + kRowsAtOnce);
    const PrefetchRange ranges[] = {range_of(gate, gate.row_bytes, row, last),
                                    range_of(up, up.row_bytes, row, last)};
    auto ahead = primed(std::begin(ranges), std::end(ranges), distance);
    gate_up(slice, x, row, last, values + row, layout_.width, ahead);
  }
}

void CpuSliceKernel::down(const std::byte* slice, const QuantizedActivations& hidden, int64_t begin,
                          int64_t end, float* sum) const {
  const SliceColumns all{0, layout_.width};
  const auto range = down_range(slice, all, begin, end);
  auto ahead = primed(&range, &range + 1, cpu_kernels::kPrefetchBytes);
  down(slice, all, {hidden, nullptr, hidden.tokens()}, begin, end,
       {sum + begin, layout_.hidden, nullptr, nullptr}, ahead);
}

void CpuSliceKernel::gate_up(const std::byte* slice, const cpu_kernels::Tokens& input, int64_t begin,
                             int64_t end, float* values, int64_t stride, PrefetchStream& ahead) const {
  assert(input.rows.columns() == layout_.hidden);
  const auto gate = matrix_of(layout_, SliceMatrix::gate, slice);
  const auto up = matrix_of(layout_, SliceMatrix::up, slice);
  float gates[kMostTokens * kRowsAtOnce];
  float ups[kMostTokens * kRowsAtOnce];
  for (int64_t row = begin; row < end; row += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, end - row);
    in_turns(input.count, ahead, [&](int64_t first, int64_t count, PrefetchStream& stream) {
      const auto x = part(input, first, count);
      kernel_(gate, x, row, rows, gates, kRowsAtOnce, stream);
      kernel_(up, x, row, rows, ups, kRowsAtOnce, stream);
      for (int64_t token = 0; token < count; ++token) {
        float* to = values + (first + token) * stride + row - begin;
        for (int64_t i = 0; i < rows; ++i) {
          to[i] = silu(gates[token * kRowsAtOnce + i]) * ups[token * kRowsAtOnce + i];
        }
      }
    });
  }
}

void CpuSliceKernel::down(const std::byte* slice, SliceColumns columns, const cpu_kernels::Tokens& hidden,
                          int64_t begin, int64_t end, const DownOutput& out, PrefetchStream& ahead) const {
  assert(hidden.rows.columns() == columns.count());
  const auto matrix = matrix_of(layout_, SliceMatrix::down, slice, columns.begin);
  float results[kMostTokens * kRowsAtOnce];
  for (int64_t row = begin; row < end; row += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, end - row);
    in_turns(hidden.count, ahead, [&](int64_t first, int64_t count, PrefetchStream& stream) {
      kernel_(matrix, part(hidden, first, count), row, rows, results, kRowsAtOnce, stream);
      for (int64_t token = 0; token < count; ++token) {
        const int64_t to_row = out.rows == nullptr ? first + token : out.rows[first + token];
        const float weight = out.weights == nullptr ? 1.0f : out.weights[first + token];
        float* to = out.sums + to_row * out.stride + row - begin;
        for (int64_t i = 0; i < rows; ++i) to[i] += weight * results[token * kRowsAtOnce + i];
      }
    });
  }
}

void CpuSliceKernel::add_gate_up_ranges(const std::byte* slice, int64_t begin, int64_t end,
                                        std::vector<PrefetchRange>& ranges) const {
  const auto gate = matrix_of(layout_, SliceMatrix::gate, slice);
  const auto up = matrix_of(layout_, SliceMatrix::up, slice);
  for (int64_t row = begin; row < end; row += kRowsAtOnce) {
    const int64_t last = std::min(end, row + kRowsAtOnce);
    ranges.push_back(range_of(gate, gate.row_bytes, row, last));
    ranges.push_back(range_of(up, up.row_bytes, row, last));
  }
}

PrefetchRange CpuSliceKernel::down_range(const std::byte* slice, SliceColumns columns, int64_t begin,
                                         int64_t end) const {
  const auto matrix = matrix_of(layout_, SliceMatrix::down, slice, columns.begin);
  return range_of(matrix, matrix.row_bytes * columns.count() / layout_.width, begin, end);
}

int64_t CpuSliceKernel::prefetch_distance(int64_t tokens, int64_t beyond) const {
  const int64_t row_bytes = value_bytes(layout_.encoding, layout_.hidden);
  return cpu_kernels::prefetch_distance(kernels_, layout_.encoding, tokens, row_bytes, beyond);
}

uint64_t CpuSliceKernel::column_bytes(SliceColumns columns) const {
  return layout_.bytes / layout_.width * columns.count();
}

void cpu_accumulate(SliceEncoding encoding, int64_t hidden, int64_t width, const std::byte* slice,
                    const float* x, int64_t tokens, float* sum, CpuScratch& scratch, CpuThreads threads) {
  CpuSliceKernel(encoding, hidden, width).accumulate(slice, x, tokens, sum, scratch, threads);
}

}  // namespace lighter
