// Quantizes expert weights into packed slices (runtime/quant/packed_slice.h), row by row or in pieces of
// rows, so that a reader can feed what it has as it comes.
//
// The same input gives the same bytes on every processor. Weights must be finite and, as scales and minima
// are fp16, at most 65504 in magnitude.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/quant/packed_slice.h"

namespace lighter {

// Quantizes `groups` groups of consecutive values. Return the first group that holds a NaN, an infinity or
// a number beyond fp16 (the outputs are then undefined from there on), or -1. Thread-safe.
//
// int8, 128 values a group: scale = max|value| / 127 rounded up to fp16, so no value is off by more than
// scale / 2. q: groups * 128 bytes.
int64_t quantize_int8(const float* values, int64_t groups, int8_t* q, uint16_t* scales);
// int4, 64 values a group: scale and minimum by a search for the least squared error (see the .cpp), never
// worse than rounding within [min, max]. q: groups * 32 bytes.
int64_t quantize_int4(const float* values, int64_t groups, uint8_t* q, uint16_t* scales, uint16_t* minimums);

// Writes one slice; does not own it. Const and thread-safe: calls may overlap in time if they write different
// groups. A slice is complete when every value of the three matrices was given once.
// All calls throw CheckpointError, with matrix, row and column, for weights that cannot be stored.
class SlicePacker {
 public:
  // slice: packed_slice_bytes, aligned to 2. Throws ConfigError like packed_slice_layout.
  SlicePacker(SliceEncoding encoding, int64_t hidden, int64_t width, std::byte* slice);

  // values: a whole row: hidden values for gate and up, width for down.
  void pack_row(SliceMatrix matrix, int64_t row, const float* values) const;
  // values: columns [first, first + count) of a row; first and count are multiples of the group size.
  void pack_part(SliceMatrix matrix, int64_t row, int64_t first, int64_t count, const float* values) const;
  // The same part of `rows` rows from first_row on, as stored by checkpoints whose matrices are transposed:
  // column first + i of row first_row + r is block[i * stride + r].
  void pack_transposed(SliceMatrix matrix, int64_t first_row, int64_t rows, int64_t first, int64_t count,
                       const float* block, int64_t stride) const;

 private:
  PackedSliceLayout layout_;
  std::byte* slice_;
};

// A slice from whole matrices: gate [width, hidden], up [width, hidden], down [hidden, width].
void pack_slice(SliceEncoding encoding, int64_t hidden, int64_t width, const float* gate, const float* up,
                const float* down, std::byte* slice);

}  // namespace lighter
