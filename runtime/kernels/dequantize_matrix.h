// CUDA: rows of a packed int8 or int4 matrix (runtime/quant/packed_slice.h) as bf16, for products with many
// tokens.
#pragma once

#include <cstdint>

#include "runtime/kernels/quant_slice.h"

namespace lighter::kernels {

// Where the rows to unpack begin, in device or mapped memory, at multiples of 16 bytes (scales and minima: of
// 2).
struct PackedRows {
  const void* q = nullptr;
  const void* scales = nullptr;
  const void* minimums = nullptr;  // int4
};

// out: bf16 [rows, columns] in device memory, `stride` elements from row to row, rounded to nearest even.
// columns is a multiple of 64 (int4) or 128, stride of 8. Enqueues on `stream` (a cudaStream_t) and returns
// at once; keeps no state; thread-safe. Throws ConfigError for other shapes, DeviceError if the launch fails.
void dequantize_matrix(Encoding encoding, const PackedRows& from, int64_t rows, int64_t columns, void* out,
                       int64_t stride, void* stream);

}  // namespace lighter::kernels
