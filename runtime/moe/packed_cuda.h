// Packed weights on a GPU, apart because a CPU build has no CUDA kernels. All of it is enqueued on the
// device's compute stream.
#pragma once

#include <ATen/core/Tensor.h>

#include "runtime/device/device.h"
#include "runtime/quant/packed_weight.h"

namespace lighter::packed_cuda {

// out: bf16 [count, matrix.columns], rows may lie apart. data: what the matrix's offsets count from.
void dequantize_rows(Device& device, SliceEncoding encoding, const PackedMatrix& matrix,
                     const std::byte* data, int64_t first, int64_t count, const at::Tensor& out);

// The network's output for x [tokens, hidden], at most 16 tokens; fp32 [tokens, hidden].
at::Tensor ffn_of_few(Device& device, const PackedWeight& ffn, const at::Tensor& x);

// gate_up: bf16 [2 · width, hidden], gates first; down: bf16 [hidden, width].
void dequantize_ffn(Device& device, const PackedWeight& ffn, const at::Tensor& gate_up, const at::Tensor& down);

}  // namespace lighter::packed_cuda
