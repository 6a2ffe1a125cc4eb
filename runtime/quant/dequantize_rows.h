// Rows of packed matrices (runtime/quant/packed_slice.h) back to floats, by all threads, for products with
// many tokens. Thread-safe for rows that differ.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/dtype.h"
#include "runtime/quant/packed_slice.h"

namespace lighter {

// Row first + i goes to to + i * stride (in elements of dtype). data: what the matrix's offsets count from.
// Values are scale * q + minimum in fp32, rounded to dtype.
void dequantize_rows(SliceEncoding encoding, const PackedMatrix& matrix, const std::byte* data, int64_t first,
                     int64_t count, DType dtype, void* to, int64_t stride);

}  // namespace lighter
