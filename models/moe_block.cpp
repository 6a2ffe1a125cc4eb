#include "models/moe_block.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/topk.h>

#include "models/attention.h"
#include "runtime/torch/tensors.h"

namespace lighter::models {
namespace {


}  // namespace

Routing route(RouterKind kind, const at::Tensor& logits, int k, const at::Tensor& experts) {
  const bool by_softmax = kind == RouterKind::softmax_normalised;
  const at::Tensor scores = by_softmax ? at::softmax(logits, -1, at::kFloat) : logits;
  const at::Tensor chosen = experts.defined() ? experts : std::get<1>(at::topk(scores, k, -1));
  const at::Tensor values = scores.gather(1, chosen);
  if (by_softmax) return {chosen, values.div(values.sum(-1, true))};  // stays fp32, as in the reference
  return {chosen, at::sigmoid(values.to(at::kFloat)).to(logits.scalar_type())};
}

MoeBlock::MoeBlock(const ModelSpec& spec, const LoadedWeights& weights, ExpertExecutor& executor,
                   RoutingSchedule schedule, Device& device)
    : spec_(spec), weights_(weights), executor_(executor), schedule_(std::move(schedule)), device_(device) {}

at::Tensor MoeBlock::forward(int layer, const at::Tensor& residual, const at::Tensor& x,
                             const Step& step) const {
  const int moe_layer = spec_.layers[layer].moe_layer;
  const at::Tensor logits = at::mm(x, weights_.at(WeightRole::router, layer).t());
  const Routing routing = route(spec_.router, logits, spec_.experts_per_token,
                                schedule_ ? scheduled(moe_layer, step) : at::Tensor());
  if (observer_ != nullptr) {
    observer_->routed(moe_layer, step, logits, routing.experts);
    report_guesses(layer, residual);
  }
  at::Tensor out = at::empty_like(x);
  executor_.enqueue(moe_layer, {x, routing.experts, routing.weights, spec_.weight_on, hints(layer, residual)},
                    out);
  return out;
}

at::Tensor MoeBlock::scheduled(int moe_layer, const Step& step) const {
  const int k = spec_.experts_per_token;
  std::vector<int64_t> experts(step.tokens.size() * k);
  for (size_t s = 0; s < step.sequences.size(); ++s) {
    const int64_t first = step.sequences[s] * kSequenceStride;
    for (int64_t i = step.offsets[s]; i < step.offsets[s + 1]; ++i) {
      schedule_(moe_layer, first + step.positions[i], &experts[i * k]);
    }
  }
  return to_device(experts, device_).view({static_cast<int64_t>(step.tokens.size()), k});
}

// The residual stream changes little from layer to layer, so the coming layers' own routers, applied to what
// is there now, are a good guess of what they will choose.
at::Tensor MoeBlock::guess(int layer, const at::Tensor& residual) const {
  const at::Tensor x = rms_norm(residual, weights_.at(WeightRole::ffn_norm, layer), spec_.norm_eps);
  return at::mm(x, weights_.at(WeightRole::router, layer).t());
}

// A schedule cannot be guessed that way.
std::vector<RoutingHint> MoeBlock::hints(int layer, const at::Tensor& residual) const {
  std::vector<RoutingHint> hints;
  if (schedule_) return hints;
  const int last = std::min(layer + executor_.hint_depth(), static_cast<int>(spec_.layers.size()) - 1);
  for (int ahead = layer + 1; ahead <= last; ++ahead) {
    if (spec_.layers[ahead].moe_layer < 0) continue;
    const at::Tensor best = std::get<1>(at::topk(guess(ahead, residual), spec_.experts_per_token, -1));
    hints.push_back({spec_.layers[ahead].moe_layer, best});
  }
  return hints;
}

void MoeBlock::report_guesses(int layer, const at::Tensor& residual) const {
  for (const int depth : observer_->guess_depths()) {
    const size_t ahead = static_cast<size_t>(layer) + depth;
    if (ahead >= spec_.layers.size() || spec_.layers[ahead].moe_layer < 0) continue;
    observer_->guessed(spec_.layers[ahead].moe_layer, depth, guess(static_cast<int>(ahead), residual));
  }
}

std::vector<SharedExpert> shared_experts(const ModelSpec& spec, const LoadedWeights& weights) {
  std::vector<SharedExpert> shared;
  if (spec.shared_ffn == 0) return shared;
  for (int i = 0; i < static_cast<int>(spec.layers.size()); ++i) {
    if (spec.layers[i].moe_layer < 0) continue;
    if (const PackedWeight* packed = weights.packed(WeightRole::shared_gate_up, i)) {
      shared.push_back({{}, {}, *packed});
    } else {
      shared.push_back({weights.at(WeightRole::shared_gate_up, i), weights.at(WeightRole::shared_down, i), {}});
    }
  }
  return shared;
}

}  // namespace lighter::models
