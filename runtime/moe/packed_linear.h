// Products of tokens with a packed matrix. Up to kFewTokens tokens are multiplied with the packed bytes on
// the CPU; else the weights are unpacked, some rows at a time, into a bounded scratch for a library product:
// in bf16 on a GPU, in x's type on the CPU.
#pragma once

#include <ATen/core/Tensor.h>

#include "runtime/device/device.h"
#include "runtime/dtype.h"
#include "runtime/quant/packed_weight.h"

namespace lighter {

inline constexpr int64_t kFewTokens = 16;

// x [tokens, columns] times the matrix, transposed: [tokens, rows] in x's type.
at::Tensor packed_linear(Device& device, const at::Tensor& x, const PackedWeight& matrix);

// Unpacks rows [first, first + out.size(0)) of a matrix into out [count, columns] (rows may lie apart): bf16
// on a GPU, bf16 or fp32 on the CPU.
void unpack_rows(Device& device, SliceEncoding encoding, const PackedMatrix& matrix, const std::byte* data,
                 int64_t first, const at::Tensor& out);

// What packed_linear() takes beside its result.
uint64_t packed_linear_bytes(int64_t rows, int64_t columns, int64_t tokens, DType dtype, bool cuda);

}  // namespace lighter
