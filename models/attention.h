// Grouped-query attention over the KV cache, with what Llama 4 adds to it.
#pragma once

#include <ATen/core/Tensor.h>

#include "models/model_spec.h"
#include "models/rope.h"
#include "models/weights.h"
#include "runtime/kv/kv_cache.h"

namespace lighter::models {

// What every layer of a step shares.
struct AttentionStep {
  const Step& step;
  const KvCache::StepIndex& index;
  Rope::Angles angles;
  at::Tensor temperature;  // [tokens, 1, 1] fp32; undefined where no layer has it
  std::array<std::vector<at::Tensor>, 2>
      masks;                              // by group and sequence: [1, groups · tokens, keys], or undefined
  std::array<at::Tensor, 2> batch_masks;  // by group: [sequences, 1, 1, keys], or undefined
};

class Attention {
 public:
  Attention(const ModelSpec& spec, const LoadedWeights& weights, KvCache& kv, Device& device, DType dtype);

  AttentionStep begin_step(const Step& step, const KvCache::StepIndex& index) const;

  // x: [tokens, hidden], normed; returns [tokens, hidden].
  at::Tensor forward(int layer, const at::Tensor& x, const AttentionStep& step) const;
  // The same before the output projection: [tokens, heads · head_dim].
  at::Tensor heads(int layer, const at::Tensor& x, const AttentionStep& step) const;

 private:
  // Writes keys and values into the cache; returns the queries, [tokens, heads, head_dim].
  at::Tensor split(int layer, const at::Tensor& qkv, const AttentionStep& step) const;
  at::Tensor of_sequence(int layer, const at::Tensor& q, const AttentionStep& step, size_t sequence) const;
  at::Tensor of_batch(int layer, const at::Tensor& q, const AttentionStep& step) const;
  bool flash() const;
  at::Tensor mask(const Step& step, size_t sequence, const KvCache::Reads& reads) const;

  const ModelSpec& spec_;
  const LoadedWeights& weights_;
  KvCache& kv_;
  Device& device_;
  const DType dtype_;
  Rope rope_;
};

// x · rsqrt(mean(x²) + eps) over the last dimension, in fp32, rounded to x's dtype.
at::Tensor normalise(const at::Tensor& x, double eps);
// RMSNorm: normalise(), then times weight in x's dtype.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);

}  // namespace lighter::models
