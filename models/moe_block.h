// One MoE layer: route, hint, execute.
#pragma once

#include <ATen/core/Tensor.h>

#include "models/model_spec.h"
#include "models/routing_observer.h"
#include "models/routing_schedule.h"
#include "models/weights.h"
#include "runtime/engine/step.h"
#include "runtime/moe/expert_executor.h"

namespace lighter::models {

// Experts and their weights, [tokens, k] each.
struct Routing {
  at::Tensor experts;  // int64
  at::Tensor weights;
};

// logits: [tokens, experts] in the model's dtype. experts: given by a schedule, or undefined for the top k.
Routing route(RouterKind kind, const at::Tensor& logits, int k, const at::Tensor& experts);

class MoeBlock {
 public:
  // schedule may be empty: then the router chooses.
  MoeBlock(const ModelSpec& spec, const LoadedWeights& weights, ExpertExecutor& executor,
           RoutingSchedule schedule, Device& device);

  // residual: [tokens, hidden] before the norm, from which the coming layers' routing is guessed;
  // x: the same, normed. Returns [tokens, hidden].
  at::Tensor forward(int layer, const at::Tensor& residual, const at::Tensor& x, const Step& step) const;

  // Null: nobody watches. It must outlive the block or be taken back.
  void observe(RoutingObserver* observer) { observer_ = observer; }

 private:
  at::Tensor scheduled(int moe_layer, const Step& step) const;
  at::Tensor guess(int layer, const at::Tensor& residual) const;
  std::vector<RoutingHint> hints(int layer, const at::Tensor& residual) const;
  void report_guesses(int layer, const at::Tensor& residual) const;

  const ModelSpec& spec_;
  const LoadedWeights& weights_;
  ExpertExecutor& executor_;
  const RoutingSchedule schedule_;
  Device& device_;
  RoutingObserver* observer_ = nullptr;
};

// The shared experts' weights in the order of the MoE layers; empty where the model has none.
std::vector<SharedExpert> shared_experts(const ModelSpec& spec, const LoadedWeights& weights);

}  // namespace lighter::models
