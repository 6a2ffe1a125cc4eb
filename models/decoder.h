// The decoder that all architectures share: embedding, layers of attention and feed-forward, norm, head.
// Not thread-safe.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>

#include "models/attention.h"
#include "models/decode_graph.h"
#include "models/model_spec.h"
#include "models/moe_block.h"
#include "models/weights.h"
#include "runtime/engine/model.h"
#include "runtime/kv/kv_cache.h"

namespace lighter::models {

class Decoder : public Model {
 public:
  // All references must outlive it. executor may be null for a model without MoE layers.
  Decoder(const ModelSpec& spec, const LoadedWeights& weights, KvCache& kv, ExpertExecutor* executor,
          RoutingSchedule schedule, Device& device, DType dtype);

  at::Tensor forward(const Step& step) override;
  std::vector<int64_t> likeliest(const Step& step) override;
  // Steps of one token of the first sequence go through the graph from now on. Null: no longer.
  void decode_by(std::unique_ptr<DecodeGraph> graph) { graph_ = std::move(graph); }
  const DecodeGraph* graph() const { return graph_.get(); }
  // The logits of every token of the step, `rows` tokens at a time, so that they need not fit all at once.
  // on_logits: the first token's place in the step; [up to rows, vocab] in fp32 on the host.
  void forward_all(const Step& step, int64_t rows,
                   const std::function<void(int64_t first, const at::Tensor& logits)>& on_logits);
  int64_t max_tokens_from(int64_t position) const override { return kv_.shape().max_tokens_from(position); }
  int64_t context() const override { return kv_.shape().context; }
  int64_t vocab() const override { return spec_.vocab; }
  void release(int sequence) override { kv_.release(sequence); }
  void rest() override;
  // Watches the routing of the steps to come; null ends it. Not for a model without MoE layers.
  void observe(RoutingObserver* observer) {
    moe_.value().observe(observer);
    observed_ = observer != nullptr;
  }

 private:
  bool fits_graph(const Step& step) const;
  at::Tensor feed_forward(int layer, const at::Tensor& residual, const Step& step) const;
  at::Tensor hidden_states(const Step& step);
  at::Tensor last_hidden_states(const Step& step);
  at::Tensor logits(const at::Tensor& hidden) const;

  const ModelSpec& spec_;
  const LoadedWeights& weights_;
  KvCache& kv_;
  ExpertExecutor* executor_;
  Device& device_;
  const DType dtype_;
  Attention attention_;
  std::optional<MoeBlock> moe_;
  std::unique_ptr<DecodeGraph> graph_;
  bool observed_ = false;
};

// The KV cache that a model needs. Throws ConfigError when context is more than the model was made for.
KvShape kv_shape(const ModelSpec& spec, int64_t context, int64_t block, int sequences, DType dtype);

}  // namespace lighter::models
