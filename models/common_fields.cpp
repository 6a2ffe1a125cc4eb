#include "models/common_fields.h"

namespace lighter::models {
namespace {

TensorNames common_names() {
  const std::string layer = "model.layers.{}.";
  TensorNames names;
  names.embedding = "model.embed_tokens.weight";
  names.final_norm = "model.norm.weight";
  names.head = "lm_head.weight";
  names.attention_norm = layer + "input_layernorm.weight";
  names.q = layer + "self_attn.q_proj.weight";
  names.k = layer + "self_attn.k_proj.weight";
  names.v = layer + "self_attn.v_proj.weight";
  names.o = layer + "self_attn.o_proj.weight";
  names.ffn_norm = layer + "post_attention_layernorm.weight";
  return names;
}

}  // namespace

ModelSpec read_common_fields(const ConfigReader& config, const FieldDefaults& defaults) {
  ModelSpec spec;
  spec.hidden = config.positive("hidden_size");
  spec.heads = config.positive("num_attention_heads");
  spec.kv_heads = config.positive("num_key_value_heads", defaults.kv_heads.value_or(spec.heads));
  spec.head_dim = config.positive("head_dim", spec.hidden / spec.heads);
  spec.vocab = config.positive("vocab_size");
  spec.max_context = config.positive("max_position_embeddings", defaults.max_context);
  spec.norm_eps = config.number("rms_norm_eps", defaults.norm_eps);
  spec.tied_head = config.flag("tie_word_embeddings", false);
  spec.rope = read_rope(config, defaults.rope_theta);
  spec.names = common_names();
  return spec;
}

}  // namespace lighter::models
