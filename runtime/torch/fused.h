// Operations between the large products as single passes over memory: bf16 on a GPU. Elsewhere they are made
// of libtorch's operations by whoever asks available() first. On libtorch's current stream; thread-safe.
#pragma once

#include <ATen/core/Tensor.h>

#include "runtime/kernels/elementwise.h"

namespace lighter::fused {

// Whether x, of rows of a multiple of 8 values, can be given to the functions below.
bool available(const at::Tensor& x);

// x: [.., width]; weight: [width].
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);
// gate_up: [rows, 2 · width], gates first; returns silu(gate) * up, [rows, width].
at::Tensor silu_times(const at::Tensor& gate_up);
// Whether qkv [tokens, heads, head_dim] can be given to qkv_step().
bool qkv_available(const at::Tensor& qkv);
void qkv_step(const kernels::QkvStep& step);

}  // namespace lighter::fused
