// Llama 3.x: dense, half-split RoPE. Reference: transformers, models/llama/modeling_llama.py.
#include "models/architectures.h"
#include "models/common_fields.h"

namespace lighter::models {

ModelSpec llama3_spec(const ConfigReader& config) {
  ModelSpec spec = read_common_fields(config, {});
  spec.architecture = "Llama3";
  spec.dense_ffn = config.positive("intermediate_size");
  spec.names.dense_gate = "model.layers.{}.mlp.gate_proj.weight";
  spec.names.dense_up = "model.layers.{}.mlp.up_proj.weight";
  spec.names.dense_down = "model.layers.{}.mlp.down_proj.weight";
  spec.layers.resize(config.layers());
  config.require("attention_bias", false);
  config.require("mlp_bias", false);
  check_spec(spec, config);
  return spec;
}

}  // namespace lighter::models
