// The gated feed-forward network of all supported models: down · (silu(gate · x) * (up · x)).
#pragma once

#include <ATen/core/Tensor.h>

namespace lighter {

// gate_up: [tokens, 2 · ffn], gates first; returns silu(gate) * up, [tokens, ffn].
at::Tensor gated(const at::Tensor& gate_up);

// x: [tokens, hidden]; gate_up: [2 · ffn, hidden], gate rows first; down: [hidden, ffn]. Returns
// [tokens, hidden], everything in x's dtype, each product rounded to it.
at::Tensor swiglu(const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down);

}  // namespace lighter
