// The one way in which the graph multiplies with a large weight, packed or not.
#pragma once

#include <ATen/core/Tensor.h>

#include "models/weights.h"

namespace lighter::models {

// x [tokens, columns] times the weight, transposed: [tokens, rows] in x's type. The products of a packed
// weight with many tokens differ from those with few by rounding (runtime/moe/packed_linear.h).
at::Tensor linear(const at::Tensor& x, const LoadedWeights& weights, WeightRole role, int layer = -1);

// A dense layer's feed-forward network.
at::Tensor dense_ffn(const at::Tensor& x, const LoadedWeights& weights, int layer);

}  // namespace lighter::models
