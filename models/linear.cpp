#include "models/linear.h"

#include <ATen/ops/mm.h>

#include "runtime/moe/packed_ffn.h"
#include "runtime/moe/packed_linear.h"
#include "runtime/moe/swiglu.h"
#include "runtime/torch/tensors.h"

namespace lighter::models {

at::Tensor embed(const LoadedWeights& weights, const ModelSpec& spec, std::span<const int64_t> tokens,
                 DType dtype) {
  const at::Tensor ids = to_device(tokens, weights.device());
  if (spec.tied_head) return weights.at(WeightRole::head).index_select(0, ids);
  // The device reads the rows from page-locked host memory itself.
  const at::Tensor& table = weights.at(WeightRole::embedding);
  return view_of(table.const_data_ptr(), table.sizes(), weights.device(), dtype).index_select(0, ids);
}

at::Tensor linear(const at::Tensor& x, const LoadedWeights& weights, WeightRole role, int layer) {
  const PackedWeight* packed = weights.packed(role, layer);
  if (packed != nullptr) return packed_linear(weights.device(), x, *packed);
  return at::mm(x, weights.at(role, layer).t());
}

at::Tensor dense_ffn(const at::Tensor& x, const LoadedWeights& weights, int layer) {
  const PackedWeight* packed = weights.packed(WeightRole::dense_gate_up, layer);
  if (packed != nullptr) return packed_ffn(weights.device(), x, *packed);
  return swiglu(x, weights.at(WeightRole::dense_gate_up, layer), weights.at(WeightRole::dense_down, layer));
}

}  // namespace lighter::models
