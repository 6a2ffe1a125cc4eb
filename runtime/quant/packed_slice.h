// The bytes of quantized weights: the one place that documents them. Disk, host, DMA, GPU and CPU kernels use
// the same bytes. Pure values; thread-safe.
//
// A slice of width W of a model of hidden size H holds three matrices, stored row by row; a row is the
// operand of a dot product:
//   gate [W, H], up [W, H], down [H, W]
// A row is cut into groups of consecutive values that share a scale (and, in int4, a minimum), both fp16.
// Little endian, no padding; H is a multiple of 128 and W of 256, so every part begins at a multiple of 256
// bytes.
//
// int8: groups of 128, symmetric. value = scale * q, q in [-127, 127] (-128 must not occur), scale >= 0.
//   [gate q  W*H int8][up q  W*H int8][down q  H*W int8]
//   [gate scale  W*H/128 fp16][up scale  W*H/128 fp16][down scale  H*W/128 fp16]
//   8.125 bits a weight.
// int4: groups of 64, asymmetric. value = scale * q + minimum, q in [0, 15], scale >= 0.
//   [gate q  W*H/2 bytes][up q  W*H/2 bytes][down q  H*W/2 bytes]
//   [gate scale  W*H/64 fp16][up scale][down scale][gate minimum  W*H/64 fp16][up minimum][down minimum]
//   A group's q are 32 bytes: byte j holds value j in its low and value j + 32 in its high nibble.
//   4.5 bits a weight.
// Value c of row r of a matrix with C columns: q number r*C + c, its scale number r*(C/group) + c/group.
//
// A matrix of its own (q, k and v stacked by rows; o; the head) of R rows and C columns is packed in the same
// way, R a multiple of 16 and C of 128:
//   [q  R*C bytes, or R*C/2][scale  R*C/group fp16], and in int4 [minimum  R*C/group fp16]
// A feed-forward network that serves every token (a shared expert, or that of a dense layer) of width F is
// stored as F / W slices of width W, one after the other: slice i holds gate rows, up rows and down columns
// [i*W, (i+1)*W). W is the routed experts' slice width where that is possible, else 256.
// In device memory each such matrix, and the first slice of each such network, begins at a multiple of 256
// bytes.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace lighter {

// dense: unquantized, laid out by runtime/moe/slice_format.h; nothing below packs or computes with it.
enum class SliceEncoding { dense, int8, int4 };
enum class SliceMatrix { gate, up, down };

constexpr std::string_view encoding_name(SliceEncoding encoding) {
  switch (encoding) {
    case SliceEncoding::dense:
      return "dense";
    case SliceEncoding::int8:
      return "int8";
    case SliceEncoding::int4:
      return "int4";
  }
  return "?";
}

// Values that share a scale; 0 for dense.
constexpr int64_t group_size(SliceEncoding encoding) {
  return encoding == SliceEncoding::int8 ? 128 : encoding == SliceEncoding::int4 ? 64 : 0;
}

// Of so many packed values, without scales and minima.
constexpr int64_t value_bytes(SliceEncoding encoding, int64_t values) {
  return encoding == SliceEncoding::int4 ? values / 2 : values;
}

// Where one matrix lies: byte offsets from the start of the slice, or of the matrix if it is one of its own.
struct PackedMatrix {
  int64_t rows = 0;
  int64_t columns = 0;
  uint64_t values_at = 0;
  uint64_t scales_at = 0;
  uint64_t minimums_at = 0;  // int4; 0 in int8
};

struct PackedSliceLayout {
  SliceEncoding encoding = SliceEncoding::int8;
  int64_t hidden = 0;
  int64_t width = 0;
  std::array<PackedMatrix, 3> matrices;  // by SliceMatrix
  uint64_t bytes = 0;

  const PackedMatrix& operator[](SliceMatrix matrix) const { return matrices[static_cast<size_t>(matrix)]; }
};

// Throws ConfigError if the encoding is dense, or the sizes do not fit the encoding.
PackedSliceLayout packed_slice_layout(SliceEncoding encoding, int64_t hidden, int64_t width);
uint64_t packed_slice_bytes(SliceEncoding encoding, int64_t hidden, int64_t width);

// One matrix of its own. Throws ConfigError if the encoding is dense, or the sizes do not fit.
PackedMatrix packed_matrix_layout(SliceEncoding encoding, int64_t rows, int64_t columns);
uint64_t packed_matrix_bytes(SliceEncoding encoding, int64_t rows, int64_t columns);

// The longest row: bounds the kernels' stack.
inline constexpr int64_t kMaxPackedColumns = 32768;

}  // namespace lighter
