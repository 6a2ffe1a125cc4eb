// The ways in which the graph uses a large weight, packed or not.
#pragma once

#include <ATen/core/Tensor.h>

#include <span>

#include "models/model_spec.h"
#include "models/weights.h"
#include "runtime/dtype.h"

namespace lighter::models {

// The tokens' rows of the embedding, [tokens, hidden].
at::Tensor embed(const LoadedWeights& weights, const ModelSpec& spec, std::span<const int64_t> tokens,
                 DType dtype);

// x [tokens, columns] times the weight, transposed: [tokens, rows] in x's type. The products of a packed
// weight with many tokens differ from those with few by rounding (runtime/moe/packed_linear.h).
at::Tensor linear(const at::Tensor& x, const LoadedWeights& weights, WeightRole role, int layer = -1);

// A dense layer's feed-forward network.
at::Tensor dense_ffn(const at::Tensor& x, const LoadedWeights& weights, int layer);

}  // namespace lighter::models
