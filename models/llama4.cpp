// Llama 4 (Scout, and Maverick with its interleaved dense layers): NoPE layers between chunked RoPE layers,
// QK norm, position-dependent temperature, sigmoid router that scales the experts' input, one shared expert.
// Reference: transformers, models/llama4/modeling_llama4.py.
#include <algorithm>

#include "models/architectures.h"

namespace lighter::models {
namespace {

TensorNames tensor_names(const std::string& prefix) {
  const std::string layer = prefix + "model.layers.{}.";
  const std::string attention = layer + "self_attn.";
  const std::string ffn = layer + "feed_forward.";
  TensorNames names;
  names.embedding = prefix + "model.embed_tokens.weight";
  names.final_norm = prefix + "model.norm.weight";
  names.head = prefix + "lm_head.weight";
  names.attention_norm = layer + "input_layernorm.weight";
  names.q = attention + "q_proj.weight";
  names.k = attention + "k_proj.weight";
  names.v = attention + "v_proj.weight";
  names.o = attention + "o_proj.weight";
  names.ffn_norm = layer + "post_attention_layernorm.weight";
  names.router = ffn + "router.weight";
  names.shared_gate = ffn + "shared_expert.gate_proj.weight";
  names.shared_up = ffn + "shared_expert.up_proj.weight";
  names.shared_down = ffn + "shared_expert.down_proj.weight";
  names.dense_gate = ffn + "gate_proj.weight";
  names.dense_up = ffn + "up_proj.weight";
  names.dense_down = ffn + "down_proj.weight";
  names.layout = ExpertLayout::fused_in_out;
  names.experts_gate = ffn + "experts.gate_up_proj";
  names.experts_down = ffn + "experts.down_proj";
  return names;
}

// 1: the layer has RoPE. An empty list means that every interval-th layer has none.
std::vector<int64_t> rope_layers(const ConfigReader& config, int64_t layers) {
  auto flags = config.integers("no_rope_layers");
  if (flags.empty()) {
    const int64_t interval = config.positive("no_rope_layer_interval", 4);
    for (int64_t i = 0; i < layers; ++i) flags.push_back((i + 1) % interval != 0);
  }
  if (static_cast<int64_t>(flags.size()) != layers) {
    config.fail("no_rope_layers has " + std::to_string(flags.size()) + " entries for " +
                std::to_string(layers) + " layers");
  }
  return flags;
}

std::vector<bool> moe_layers(const ConfigReader& config, int64_t layers) {
  std::vector<bool> moe(layers);
  if (config.has("moe_layers")) {
    for (const int64_t layer : config.integers("moe_layers")) {
      if (layer < 0 || layer >= layers) config.fail("moe_layers names layer " + std::to_string(layer));
      moe[layer] = true;
    }
  } else {
    const int64_t step = config.positive("interleave_moe_layer_step", 1);
    for (int64_t layer = step - 1; layer < layers; layer += step) moe[layer] = true;
  }
  return moe;
}

// As layer_types says; without it, RoPE layers are chunked.
std::vector<bool> chunked_layers(const ConfigReader& config, const std::vector<int64_t>& rope) {
  std::vector<bool> chunked(rope.begin(), rope.end());
  const auto types = config.texts("layer_types");
  if (!types.empty() && types.size() != rope.size()) {
    config.fail("layer_types has " + std::to_string(types.size()) + " entries for " +
                std::to_string(rope.size()) + " layers");
  }
  for (size_t i = 0; i < types.size(); ++i) {
    if (types[i] != "chunked_attention" && types[i] != "full_attention") {
      config.fail("layer_types: '" + types[i] + "' is not supported");
    }
    chunked[i] = types[i] == "chunked_attention";
  }
  if (!config.has("attention_chunk_size") && types.empty()) std::fill(chunked.begin(), chunked.end(), false);
  return chunked;
}

}  // namespace

ModelSpec llama4_spec(const ConfigReader& whole) {
  const bool nested = whole.has("text_config");
  const ConfigReader config = nested ? whole.object("text_config") : whole;
  ModelSpec spec;
  spec.architecture = "Llama4";
  spec.hidden = config.positive("hidden_size");
  spec.heads = config.positive("num_attention_heads");
  spec.kv_heads = config.positive("num_key_value_heads", 8);
  spec.head_dim = config.positive("head_dim", 128);
  spec.vocab = config.positive("vocab_size");
  spec.max_context = config.positive("max_position_embeddings", 4096 * 32);
  spec.norm_eps = config.number("rms_norm_eps", 1e-5);
  spec.tied_head = config.flag("tie_word_embeddings", false);
  spec.rope = read_rope(config, 500000.0);
  spec.rope.interleaved = true;
  spec.attention_chunk = config.positive("attention_chunk_size", 8192);
  spec.attention_scale = config.number("attn_scale", 0.1);
  spec.floor_scale = config.number("floor_scale", 8192);
  spec.dense_ffn = config.positive("intermediate_size_mlp", 16384);
  spec.experts = static_cast<int>(config.positive("num_local_experts", 16));
  spec.experts_per_token = static_cast<int>(config.positive("num_experts_per_tok", 1));
  spec.expert_ffn = spec.shared_ffn = config.positive("intermediate_size", 8192);
  spec.router = RouterKind::sigmoid;
  spec.weight_on = WeightOn::input;
  spec.names = tensor_names(nested ? "language_model." : "");

  const int64_t layers = config.layers();
  const auto rope = rope_layers(config, layers);
  const auto moe = moe_layers(config, layers);
  const auto chunked = chunked_layers(config, rope);
  const bool qk_norm = config.flag("use_qk_norm", true);
  const bool temperature = config.flag("attn_temperature_tuning", true);
  int next_moe = 0;
  for (int64_t i = 0; i < layers; ++i) {
    spec.layers.push_back({rope[i] != 0, chunked[i], qk_norm && rope[i] != 0, temperature && rope[i] == 0,
                           moe[i] ? next_moe++ : -1});
  }
  config.require("attention_bias", false);
  check_spec(spec, config);
  return spec;
}

}  // namespace lighter::models
