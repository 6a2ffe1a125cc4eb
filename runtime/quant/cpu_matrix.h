// Packed matrices (runtime/quant/packed_slice.h) times a few tokens on the CPU, with the slices' kernels and
// their arithmetic: activations quantized to int8 in groups, sums in fp32 in one fixed order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/quant/activations.h"
#include "runtime/quant/packed_slice.h"

namespace lighter {

inline constexpr int64_t kMostMatrixTokens = 16;

// out [tokens, matrix.rows] = x [tokens, matrix.columns] times the matrix, transposed. Rows are spread over
// oneTBB's threads. data: what the matrix's offsets count from. At most kMostMatrixTokens tokens.
// scratch belongs to the call and keeps its memory. Thread-safe.
void cpu_matrix_product(SliceEncoding encoding, const PackedMatrix& matrix, const std::byte* data,
                        const float* x, int64_t tokens, float* out, QuantizedActivations& scratch);

}  // namespace lighter
