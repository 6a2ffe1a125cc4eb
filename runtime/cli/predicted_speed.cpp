#include "runtime/cli/predicted_speed.h"

#include <algorithm>

#include "runtime/cli/session.h"

namespace lighter::cli {

offload::SpeedShape speed_shape(const PreparedModel& model, const Config& config) {
  const models::ModelSpec& spec = model.spec;
  offload::SpeedShape shape;
  shape.layers = static_cast<int>(spec.layers.size());
  shape.moe_layers = spec.moe_layers();
  for (const models::Weight& weight : models::list_weights(spec)) {
    using models::WeightClass;
    if (weight.weight_class == WeightClass::embedding) continue;  // one row is read
    auto& bytes = weight.weight_class == WeightClass::head            ? shape.head
                  : weight.weight_class == WeightClass::shared_expert ? shape.shared
                                                                      : shape.outside;
    bytes[model.formats.of(weight)] += models::weight_bytes(model.formats, weight);
  }
  if (shape.moe_layers > 0) {
    shape.expert_format = config.model.experts;
    shape.expert = static_cast<uint64_t>(spec.expert_ffn / model.slice_width) * model.slice_bytes;
    shape.experts = spec.experts;
    shape.experts_per_token = spec.experts_per_token;
  }
  shape.dense_weight_bytes = static_cast<int>(dtype_size(config.model.dtype));
  shape.kv_per_token = spec.layers.size() * 2 * static_cast<uint64_t>(spec.kv_heads * spec.head_dim) *
                       dtype_size(config.model.dtype);
  shape.operations_per_key = 4.0 * static_cast<double>(spec.heads * spec.head_dim) * shape.layers;
  return shape;
}

offload::MissMode miss_mode(const PreparedModel& model) {
  using Miss = OffloadConfig::Miss;
  if (model.miss == Miss::zero_copy) return offload::MissMode::zero_copy;
  if (model.miss == Miss::cpu) return offload::MissMode::cpu;
  return model.miss == Miss::split ? offload::MissMode::split : offload::MissMode::fetch;
}

offload::MissMode miss_mode_of_prompts(const PreparedModel& model, const Config& config) {
  if (!cpu_shares_prompts(model, config)) return offload::MissMode::fetch;
  return config.offload.miss == OffloadConfig::Miss::cpu ? offload::MissMode::cpu : offload::MissMode::split;
}

offload::MissMode miss_mode_of_batches(const PreparedModel& model, const Config& config) {
  return cpu_shares_batches(model, config) ? miss_mode_of_prompts(model, config) : offload::MissMode::fetch;
}

namespace {

// Eagerly there is only one.
std::vector<offload::MissMode> possible_modes(const PreparedModel& model) {
  using offload::MissMode;
  if (!model.why_eager.empty()) return {MissMode::fetch};
  return {MissMode::fetch, MissMode::zero_copy, MissMode::cpu, MissMode::split};
}

}  // namespace

PredictedSpeed predict_speed(const PreparedModel& model, const Config& config,
                             const offload::Calibration& c) {
  constexpr int64_t kPrompt = 8192;
  const offload::SpeedShape shape = speed_shape(model, config);
  const double resident = model.plan.all_resident ? 1 : model.plan.resident_share;
  PredictedSpeed speed;
  speed.decode_context = static_cast<double>(config.memory.context) / 2;
  const offload::MissMode chosen = miss_mode(model);
  const offload::DecodeLoad load{resident, 1, speed.decode_context, model.why_eager.empty()};
  for (const auto mode : possible_modes(model)) {
    if (const auto way = offload::decode_speed(shape, load, c, mode)) speed.ways.push_back(*way);
  }
  speed.decode = offload::best_decode_speed(shape, load, c, {&chosen, 1});
  if (const auto step =
          offload::step_bound_s(offload::step_bytes(shape), resident, offload::way_of(speed.decode.mode),
                                c.ceilings(), 1, speed.decode_context)) {
    speed.decode_bound_tokens_per_s = 1 / *step;
  }
  speed.prefill_tokens = std::min(kPrompt, config.memory.context);
  speed.prefill = offload::prefill_speed(shape, resident, speed.prefill_tokens, model.prefill_chunk, c,
                                         miss_mode_of_prompts(model, config));
  return speed;
}

}  // namespace lighter::cli
