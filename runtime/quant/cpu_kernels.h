// The CPU's matrix kernels for packed slices: rows of int8 or int4 weights times quantized activations.
// Internal to runtime/quant; users call cpu_slice.h.
//
// One arithmetic for all paths and numbers of tokens, so that their results are equal bit for bit, except for
// kAmxTokens and more with AMX, below. A row's result is, in fp32,
//   int8: for each group g in order, for each of 16 lanes l:
//         a[l] = fma(scale[g] * as[g], float(dot[g][l]), a[l])
//   int4: for each pair of groups: the same, lanes 0–7 belong to the first group and 8–15 to the second (an
//         odd last group's partner is zeros); besides, for each 16 groups (the last are filled up with
//         zeros): m[l] = fma(minimum[l], sums[l], m[l]); at the end a[l] += m[l]
//   result = a tree over the lanes: l with l + 8, then l + 4, l + 2, l + 1
// dot[g][l] is the exact integer sum of the products in lane l: bytes 4l to 4l + 3 of each 64 bytes of int8
// values, or of each 64 nibbles of a pair as QuantizedActivations lays them out.
// AMX sums a group whole, so that there are no lanes, and each group's minimum comes before its dot product:
//   for each group g in order, in int4: a = fma(minimum[g], sums[g], a);
//   a = fma(scale[g] * as[g], float(dot[g]), a)
// It takes blocks of kRowBlock rows, counted from the first; rows that are left over are as without it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/quant/activations.h"
#include "runtime/quant/packed_slice.h"
#include "runtime/quant/prefetch_stream.h"

namespace lighter::cpu_kernels {

inline constexpr int64_t kRowBlock = 16;
// From so many tokens on AMX multiplies blocks of kRowBlock rows; with fewer, any number of rows is as good.
inline constexpr int64_t kAmxTokens = 2;
inline constexpr int64_t kLanes = QuantizedActivations::kLanes;
inline constexpr int64_t kMaxGroups8 = kMaxPackedColumns / 128;
inline constexpr int64_t kMaxGroups4 = kMaxPackedColumns / 64;
// Asked for ahead, beyond the rows that are read side by side, into the second-level cache: on a Sapphire
// Rapids with 15 threads 2 to 16 KB read 3 to 15 % less, and asking into the first level up to 5 %.
inline constexpr int64_t kPrefetchBytes = 4096;

// Where the packed rows of one matrix begin, or the same groups of columns of each.
struct Matrix {
  const uint8_t* values = nullptr;
  const uint16_t* scales = nullptr;
  const uint16_t* minimums = nullptr;  // int4
  int64_t row_bytes = 0;               // from row to row, of values
  int64_t row_groups = 0;              // from row to row, of scales and minimums
};

// The rows of activations that are multiplied: token t's is index[first + t], or without an index first + t.
struct Tokens {
  const QuantizedActivations& rows;
  const int32_t* index = nullptr;
  int64_t count = 0;
  int64_t first = 0;

  int64_t operator[](int64_t token) const { return index == nullptr ? first + token : index[first + token]; }
};

// result[t * stride + r - first_row] = row r times token t, for rows [first_row, first_row + count).
// Thread-safe.
using RowsKernel = void (*)(const Matrix& matrix, const Tokens& x, int64_t first_row, int64_t count,
                            float* result, int64_t stride, PrefetchStream& ahead);

struct Kernels {
  RowsKernel int8 = nullptr;
  RowsKernel int4 = nullptr;
  // Rows that are read side by side for 1 and for more tokens, in int8 and in int4. Weights are asked for row
  // after row, so those beside the first belong to the distance.
  int64_t rows_at_once[2][2] = {{1, 1}, {1, 1}};
};

// How far ahead to ask for rows of so many bytes, `beyond` those that are read side by side.
inline int64_t prefetch_distance(const Kernels& kernels, SliceEncoding encoding, int64_t tokens,
                                 int64_t row_bytes, int64_t beyond = kPrefetchBytes) {
  const auto& rows = kernels.rows_at_once[encoding == SliceEncoding::int4 ? 1 : 0];
  return beyond + (rows[tokens <= 1 ? 0 : 1] - 1) * row_bytes;
}

Kernels scalar_kernels();
#if defined(__x86_64__)
Kernels avx2_kernels();    // needs AVX2, FMA, F16C
Kernels avx512_kernels();  // needs AVX-512 F, BW, VL, VNNI
Kernels amx_kernels();     // besides, AMX TILE and INT8, and at most 16 tokens
// Whether the processor has AMX and the kernel lets this process use it, which this asks it for.
bool amx_permitted();
#endif

}  // namespace lighter::cpu_kernels
