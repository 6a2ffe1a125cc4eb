#include "models/attention.h"

#include <ATen/ops/_scaled_dot_product_flash_attention.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <limits>

#include "models/linear.h"
#include "runtime/torch/fused.h"
#include "runtime/torch/tensors.h"

namespace lighter::models {

at::Tensor normalise(const at::Tensor& x, double eps) {
  const at::Tensor wide = x.to(at::kFloat);
  const at::Tensor mean_square = wide.pow(2).mean(-1, true);
  return wide.mul(mean_square.add(eps).rsqrt()).to(x.scalar_type());
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  if (fused::available(x)) return fused::rms_norm(x, weight, eps);
  return normalise(x, eps).mul(weight);
}

Attention::Attention(const ModelSpec& spec, const LoadedWeights& weights, KvCache& kv, Device& device,
                     DType dtype)
    : spec_(spec),
      weights_(weights),
      kv_(kv),
      device_(device),
      dtype_(dtype),
      rope_(spec.rope, spec.head_dim, device) {}

AttentionStep Attention::begin_step(const Step& step, const KvCache::StepIndex& index) const {
  const at::Tensor positions = to_device(step.positions, device_);
  AttentionStep shared{step, index, rope_.angles(positions), {}, {}, {}};
  for (const LayerSpec& layer : spec_.layers) {
    if (!layer.temperature) continue;
    // 1 + scale · log1p(floor((position + 1) / floor_scale)): none before floor_scale - 1.
    const at::Tensor floors = positions.to(at::kFloat).add(1).div(spec_.floor_scale).floor();
    shared.temperature = floors.log1p().mul(spec_.attention_scale).add(1).view({-1, 1, 1});
    break;
  }
  for (size_t group = 0; group < 2; ++group) {
    const auto& reads = index.groups[group].reads;
    for (size_t i = 0; i < reads.size(); ++i) shared.masks[group].push_back(mask(step, i, reads[i]));
    const at::Tensor& hidden = index.groups[group].batch_hidden;
    if (!hidden.defined()) continue;
    at::Tensor batch_mask = at::zeros(hidden.sizes(), tensor_options(device_, dtype_));
    batch_mask.masked_fill_(hidden, -std::numeric_limits<double>::infinity());
    shared.batch_masks[group] = batch_mask.unsqueeze(1).unsqueeze(1);
  }
  return shared;
}

// Queries of one key/value head's group follow one another: [group, tokens] rows. A single token sees every
// key.
at::Tensor Attention::mask(const Step& step, size_t sequence, const KvCache::Reads& reads) const {
  const int64_t tokens = step.offsets[sequence + 1] - step.offsets[sequence];
  if (tokens == 1 || flash()) return {};
  const auto options = tensor_options(device_, dtype_).dtype(at::kLong);
  const at::Tensor queries =
      at::arange(tokens, options).add(step.positions[step.offsets[sequence]]).unsqueeze(1);
  const at::Tensor keys = at::arange(reads.keys, options).add(reads.first_position).unsqueeze(0);
  at::Tensor mask = at::zeros({tokens, reads.keys}, tensor_options(device_, dtype_));
  mask.masked_fill_(keys.gt(queries), -std::numeric_limits<double>::infinity());
  return mask.repeat({spec_.heads / spec_.kv_heads, 1}).unsqueeze(0);
}

// Needs no mask: the queries are the last of the keys.
bool Attention::flash() const {
  return device_.is_cuda() && dtype_ == DType::bf16;
}

at::Tensor Attention::split(int layer, const at::Tensor& qkv, const AttentionStep& shared) const {
  const LayerSpec& kind = spec_.layers[layer];
  if (fused::qkv_available(qkv)) {
    const at::Tensor out = at::empty({qkv.size(0), spec_.heads, spec_.head_dim}, qkv.options());
    kernels::QkvStep step;
    step.qkv = qkv.const_data_ptr();
    step.tokens = qkv.size(0);
    step.heads = static_cast<int>(spec_.heads);
    step.kv_heads = static_cast<int>(spec_.kv_heads);
    step.head_dim = static_cast<int>(spec_.head_dim);
    step.rope = kind.rope;
    step.interleaved = spec_.rope.interleaved;
    step.cos = shared.angles.cos.const_data_ptr<float>();
    step.sin = shared.angles.sin.const_data_ptr<float>();
    step.qk_norm = kind.qk_norm;
    step.eps = static_cast<float>(spec_.norm_eps);
    if (kind.temperature) step.temperature = shared.temperature.const_data_ptr<float>();
    step.rows = shared.index.groups[kv_.chunked(layer)].writes.const_data_ptr<int64_t>();
    step.keys = kv_.key_data(layer);
    step.values = kv_.value_data(layer);
    step.q = out.data_ptr();
    fused::qkv_step(step);
    return out;
  }
  at::Tensor q = qkv.narrow(1, 0, spec_.heads);
  at::Tensor k = qkv.narrow(1, spec_.heads, spec_.kv_heads);
  const at::Tensor v = qkv.narrow(1, spec_.heads + spec_.kv_heads, spec_.kv_heads);
  if (kind.rope) {
    q = rope_.rotate(q, shared.angles);
    k = rope_.rotate(k, shared.angles);
  }
  if (kind.qk_norm) {
    q = normalise(q, spec_.norm_eps);
    k = normalise(k, spec_.norm_eps);
  }
  if (kind.temperature) q = q.mul(shared.temperature).to(qkv.scalar_type());
  kv_.write(layer, shared.index, k, v);
  return q;
}

at::Tensor Attention::of_sequence(int layer, const at::Tensor& q, const AttentionStep& shared,
                                  size_t i) const {
  const auto& reads = shared.index.groups[kv_.chunked(layer)].reads[i];
  const at::Tensor& mask = shared.masks[kv_.chunked(layer)][i];
  const int64_t group = spec_.heads / spec_.kv_heads;
  const int64_t begin = shared.step.offsets[i];
  const int64_t count = shared.step.offsets[i + 1] - begin;
  const double scale = 1.0 / std::sqrt(static_cast<double>(spec_.head_dim));
  const at::Tensor keys = kv_.keys(layer, reads).transpose(0, 1).unsqueeze(0);
  const at::Tensor values = kv_.values(layer, reads).transpose(0, 1).unsqueeze(0);
  if (count > 1 && flash()) {
    const at::Tensor queries = q.narrow(0, begin, count).transpose(0, 1).unsqueeze(0);
    const auto out = at::_scaled_dot_product_flash_attention(queries, keys, values, 0.0, true, false, scale);
    return std::get<0>(out).transpose(1, 2).reshape({count, spec_.heads * spec_.head_dim});
  }
  // Every key/value head serves `group` query heads, stacked as further queries: [kv_heads, group · count,
  // dim].
  const at::Tensor queries = q.narrow(0, begin, count)
                                 .reshape({count, spec_.kv_heads, group, spec_.head_dim})
                                 .permute({1, 2, 0, 3})
                                 .reshape({1, spec_.kv_heads, group * count, spec_.head_dim});
  const at::Tensor out = at::scaled_dot_product_attention(
      queries, keys, values, mask.defined() ? std::optional(mask.unsqueeze(0)) : std::nullopt, 0.0, false,
      scale);
  return out.view({spec_.kv_heads, group, count, spec_.head_dim})
      .permute({2, 0, 1, 3})
      .reshape({count, spec_.heads * spec_.head_dim});
}

at::Tensor Attention::of_batch(int layer, const at::Tensor& q, const AttentionStep& shared) const {
  const auto& group = shared.index.groups[kv_.chunked(layer)];
  const at::Tensor& mask = shared.batch_masks[kv_.chunked(layer)];
  const int64_t count = q.size(0);
  const auto by_sequence = [&](const at::Tensor& rows) {
    return rows.view({count, group.keys, spec_.kv_heads, spec_.head_dim}).transpose(1, 2);
  };
  const int64_t queries_each = spec_.heads / spec_.kv_heads;
  const at::Tensor queries = q.reshape({count, spec_.kv_heads, queries_each, spec_.head_dim});
  const at::Tensor out = at::scaled_dot_product_attention(
      queries, by_sequence(kv_.batch_keys(layer, shared.index)),
      by_sequence(kv_.batch_values(layer, shared.index)),
      mask.defined() ? std::optional(mask.expand({count, spec_.kv_heads, queries_each, group.keys}))
                     : std::nullopt,
      0.0, false, 1.0 / std::sqrt(static_cast<double>(spec_.head_dim)));
  return out.reshape({count, spec_.heads * spec_.head_dim});
}

at::Tensor Attention::forward(int layer, const at::Tensor& x, const AttentionStep& shared) const {
  return linear(heads(layer, x, shared), weights_, WeightRole::o, layer);
}

at::Tensor Attention::heads(int layer, const at::Tensor& x, const AttentionStep& shared) const {
  const at::Tensor qkv = linear(x, weights_, WeightRole::qkv, layer)
                             .view({x.size(0), spec_.heads + 2 * spec_.kv_heads, spec_.head_dim});
  const at::Tensor q = split(layer, qkv, shared);
  const auto& group = shared.index.groups[kv_.chunked(layer)];
  if (group.batch_rows.defined()) return of_batch(layer, q, shared);
  std::vector<at::Tensor> outputs;
  for (size_t i = 0; i < group.reads.size(); ++i) outputs.push_back(of_sequence(layer, q, shared, i));
  return outputs.size() == 1 ? outputs[0] : at::cat(outputs);
}

}  // namespace lighter::models
