// Llama 3.x: dense, half-split RoPE. Reference: transformers, models/llama/modeling_llama.py.
#include "models/architectures.h"
#include "models/common_names.h"

namespace lighter::models {

ModelSpec llama3_spec(const ConfigReader& config) {
  ModelSpec spec;
  spec.architecture = "Llama3";
  spec.hidden = config.positive("hidden_size");
  spec.heads = config.positive("num_attention_heads");
  spec.kv_heads = config.positive("num_key_value_heads", spec.heads);
  spec.head_dim = config.positive("head_dim", spec.hidden / spec.heads);
  spec.vocab = config.positive("vocab_size");
  spec.max_context = config.positive("max_position_embeddings", 2048);
  spec.norm_eps = config.number("rms_norm_eps", 1e-6);
  spec.tied_head = config.flag("tie_word_embeddings", false);
  spec.rope = read_rope(config, 10000.0);
  spec.dense_ffn = config.positive("intermediate_size");
  spec.names = common_names();
  spec.names.dense_gate = "model.layers.{}.mlp.gate_proj.weight";
  spec.names.dense_up = "model.layers.{}.mlp.up_proj.weight";
  spec.names.dense_down = "model.layers.{}.mlp.down_proj.weight";
  spec.layers.resize(config.positive("num_hidden_layers"));
  config.require("attention_bias", false);
  config.require("mlp_bias", false);
  check_spec(spec, config);
  return spec;
}

}  // namespace lighter::models
