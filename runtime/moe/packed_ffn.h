// A packed feed-forward network that every token passes: a shared expert, or that of a dense layer. Up to 16
// tokens are computed slice by slice with the routed experts' kernels; for more, the network is unpacked into
// a scratch for library products.
#pragma once

#include <ATen/core/Tensor.h>

#include "runtime/device/device.h"
#include "runtime/dtype.h"
#include "runtime/moe/expert_executor.h"
#include "runtime/quant/packed_weight.h"

namespace lighter {

// x: [tokens, hidden]; returns the same, in x's type.
at::Tensor packed_ffn(Device& device, const at::Tensor& x, const PackedWeight& ffn);

// Packed or not.
at::Tensor shared_output(Device& device, const at::Tensor& x, const SharedExpert& expert);

// What packed_ffn() takes beside its result. width: of all slices.
uint64_t packed_ffn_bytes(int64_t hidden, int64_t width, int64_t tokens, DType dtype, bool cuda);

}  // namespace lighter
