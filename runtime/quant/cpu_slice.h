// Computes with packed slices (packed_slice.h) on the CPU: sum += down · (silu(gate · x) * (up · x)).
//
// Activations, and the hidden ones between the two halves, are quantized to int8 in groups (activations.h);
// dot products are exact integers, scaled and added in fp32 in one fixed order (cpu_kernels.h). So a result
// depends neither on the path, nor on the number of threads, nor on the other tokens in a batch; only with
// AMX it is rounded in another order where two tokens or more share a slice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "runtime/quant/activations.h"
#include "runtime/quant/cpu_kernels.h"
#include "runtime/quant/packed_slice.h"

namespace lighter {

enum class CpuPath { scalar, avx2, avx512_vnni, amx };

constexpr std::string_view path_name(CpuPath path) {
  switch (path) {
    case CpuPath::scalar:
      return "scalar";
    case CpuPath::avx2:
      return "AVX2";
    case CpuPath::avx512_vnni:
      return "AVX-512 VNNI";
    case CpuPath::amx:
      return "AMX and AVX-512 VNNI";
  }
  return "?";
}

// What this processor has, the fastest last.
std::vector<CpuPath> supported_cpu_paths();
cpu_kernels::Kernels kernels_of(CpuPath path);

// Working memory of one computation at a time. Grows and keeps its memory: none is allocated for as many
// tokens as it has served (with the same sizes).
struct CpuScratch {
  QuantizedActivations input;
  QuantizedActivations hidden;
  std::vector<float> hidden_values;  // [tokens, width]
};

// Where a call's rows are computed. oneTBB: on the arena of the calling thread.
enum class CpuThreads { calling, tbb };

// A part of a slice's width: multiples of the group size.
struct SliceColumns {
  int64_t begin = 0;
  int64_t end = 0;

  int64_t count() const { return end - begin; }
};

// Where the rows [begin, end) of a slice's output go: sums[rows[t] * stride + row - begin] += weights[t] *
// output of the t-th token.
struct DownOutput {
  float* sums = nullptr;
  int64_t stride = 0;
  const int32_t* rows = nullptr;   // without: t
  const float* weights = nullptr;  // without: 1
};

// Immutable and thread-safe; scratch and outputs belong to one call.
class CpuSliceKernel {
 public:
  static constexpr int64_t kMostTokens = 16;  // in one of the steps below; accumulate() takes more in turns

  // Throws ConfigError like packed_slice_layout. Without a path, the fastest that this processor has; a path
  // that it lacks is a ConfigError.
  CpuSliceKernel(SliceEncoding encoding, int64_t hidden, int64_t width);
  CpuSliceKernel(SliceEncoding encoding, int64_t hidden, int64_t width, CpuPath path);

  const PackedSliceLayout& layout() const { return layout_; }

  // sum [tokens, hidden] += the slice's output for x [tokens, hidden]. slice: aligned to 2; x and sum: to 4.
  void accumulate(const std::byte* slice, const float* x, int64_t tokens, float* sum, CpuScratch& scratch,
                  CpuThreads threads = CpuThreads::calling) const;

  // The same in steps, for rows that are spread over workers:
  //   quantize_input → gate_up of all rows → quantize_hidden → down of all rows
  // Calls on disjoint ranges may run at once. The input's quantization serves all slices that the tokens
  // need. More than kMostTokens tokens are a CapacityError.
  void quantize_input(const float* x, int64_t tokens, QuantizedActivations& input) const;
  // values [tokens, width], columns [begin, end) = silu(gate · x) * (up · x).
  void gate_up(const std::byte* slice, const QuantizedActivations& input, int64_t begin, int64_t end,
               float* values) const;
  void quantize_hidden(const float* values, int64_t tokens, QuantizedActivations& hidden) const;
  // sum [tokens, hidden], columns [begin, end) += down · hidden.
  void down(const std::byte* slice, const QuantizedActivations& hidden, int64_t begin, int64_t end,
            float* sum) const;

  // And for an executor with workers of its own: chosen rows of activations, any number of them; a part of
  // the slice's width; weights prefetched over the ends of slices, `ahead` being made of the ranges of all
  // that the worker will read, in this order. Any ranges of rows.
  // values [tokens, stride] = silu(gate · x) * (up · x) of the slice's columns [begin, end), the first at 0.
  void gate_up(const std::byte* slice, const cpu_kernels::Tokens& input, int64_t begin, int64_t end,
               float* values, int64_t stride, PrefetchStream& ahead) const;
  // Rows [begin, end) of down · hidden, where hidden has the values of `columns` alone, are added to `out`.
  void down(const std::byte* slice, SliceColumns columns, const cpu_kernels::Tokens& hidden, int64_t begin,
            int64_t end, const DownOutput& out, PrefetchStream& ahead) const;
  // What the two calls read, in their order.
  void add_gate_up_ranges(const std::byte* slice, int64_t begin, int64_t end,
                          std::vector<PrefetchRange>& ranges) const;
  PrefetchRange down_range(const std::byte* slice, SliceColumns columns, int64_t begin, int64_t end) const;
  // How far ahead the weights should be asked for when so many tokens share them: `beyond` the rows that are
  // read side by side.
  int64_t prefetch_distance(int64_t tokens, int64_t beyond) const;
  // Bytes of the slice's columns [begin, end) in its three matrices, scales included.
  uint64_t column_bytes(SliceColumns columns) const;

 private:
  PackedSliceLayout layout_;
  cpu_kernels::Kernels kernels_;
  cpu_kernels::RowsKernel kernel_;  // of them
};

// For a single use; scratch is kept by the caller.
void cpu_accumulate(SliceEncoding encoding, int64_t hidden, int64_t width, const std::byte* slice,
                    const float* x, int64_t tokens, float* sum, CpuScratch& scratch,
                    CpuThreads threads = CpuThreads::calling);

}  // namespace lighter
