// Packed slices back to fp32. Pure functions; thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/quant/packed_slice.h"

namespace lighter {

// The value that the bytes stand for; scale * q + minimum in fp32, rounded once after each operation.
// slice: aligned to 2.
float packed_value(const PackedSliceLayout& layout, const std::byte* slice, SliceMatrix matrix, int64_t row,
                   int64_t column);

// values: [columns] of a matrix's row.
void dequantize_row(const PackedSliceLayout& layout, const std::byte* slice, SliceMatrix matrix, int64_t row,
                    float* values);
// values: the whole matrix, row by row.
void dequantize_matrix(const PackedSliceLayout& layout, const std::byte* slice, SliceMatrix matrix,
                       float* values);

}  // namespace lighter
