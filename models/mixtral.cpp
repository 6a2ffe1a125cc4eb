// Mixtral: top-2 of 8 experts in every layer, softmax router whose weights scale the experts' output.
// Reference: transformers, models/mixtral/modeling_mixtral.py.
#include "models/architectures.h"
#include "models/common_fields.h"

namespace lighter::models {

ModelSpec mixtral_spec(const ConfigReader& config) {
  ModelSpec spec = read_common_fields(
      config, {.kv_heads = 8, .max_context = 4096 * 32, .norm_eps = 1e-5, .rope_theta = 1e6});
  spec.architecture = "Mixtral";
  spec.experts = static_cast<int>(config.positive("num_local_experts", 8));
  spec.experts_per_token = static_cast<int>(config.positive("num_experts_per_tok", 2));
  spec.expert_ffn = config.positive("intermediate_size");
  spec.router = RouterKind::softmax_normalised;
  spec.weight_on = WeightOn::output;
  const std::string moe = "model.layers.{}.block_sparse_moe.";
  spec.names.router = moe + "gate.weight";
  spec.names.layout = ExpertLayout::separate_out_in;
  spec.names.experts_gate = moe + "experts.{e}.w1.weight";
  spec.names.experts_up = moe + "experts.{e}.w3.weight";
  spec.names.experts_down = moe + "experts.{e}.w2.weight";
  const int64_t layers = config.layers();
  for (int i = 0; i < layers; ++i) spec.layers.push_back({.moe_layer = i});
  if (config.has("sliding_window")) {
    config.fail(
        "sliding_window is set; sliding-window attention is not supported (Mixtral-8x7B and -8x22B have "
        "none)");
  }
  check_spec(spec, config);
  return spec;
}

}  // namespace lighter::models
