// Tensor names that Llama 3 and Mixtral have in common.
#pragma once

#include "models/model_spec.h"

namespace lighter::models {

inline TensorNames common_names() {
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

}  // namespace lighter::models
