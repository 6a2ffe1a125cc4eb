// What a decoder-only transformer is made of, as one plain value that the shared decoder builds from. Each
// architecture's file (llama4.cpp, llama3.cpp, mixtral.cpp) makes it from config.json; nothing after that
// asks which architecture it is.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "runtime/moe/expert_executor.h"

namespace lighter::models {

// Llama 3's scaling of long wavelengths (transformers: modeling_rope_utils, _compute_llama3_parameters).
struct RopeScaling {
  double factor = 1;
  double low_freq_factor = 1;
  double high_freq_factor = 4;
  double original_context = 8192;
};

struct RopeSpec {
  double theta = 10000;
  std::optional<RopeScaling> scaling;
  bool interleaved =
      false;  // pairs (2i, 2i+1), computed in fp32; else pairs (i, i + head_dim/2) in the dtype
};

struct LayerSpec {
  bool rope = true;
  bool chunked = false;      // attends within blocks of attention_chunk positions
  bool qk_norm = false;      // weightless, per head, after RoPE
  bool temperature = false;  // Q grows with log of the position
  int moe_layer = -1;        // its number among the MoE layers; -1: dense
};

enum class RouterKind {
  sigmoid,            // weight = sigmoid(logit), for the top-k logits; no renormalisation
  softmax_normalised  // weights = softmax over all, top-k, divided by their sum; in fp32
};

// How a checkpoint lays out the experts of a layer.
enum class ExpertLayout {
  fused_in_out,    // gate_up [experts, hidden, 2·ffn], down [experts, ffn, hidden]
  separate_out_in  // per expert: gate [ffn, hidden], up [ffn, hidden], down [hidden, ffn]
};

// Tensor names in the checkpoint. Per-layer names have "{}" for the layer, experts' also "{e}".
struct TensorNames {
  std::string embedding, final_norm, head;
  std::string attention_norm, q, k, v, o, ffn_norm;
  std::string router;
  std::string shared_gate, shared_up, shared_down;
  std::string dense_gate, dense_up, dense_down;
  ExpertLayout layout = ExpertLayout::fused_in_out;
  std::string experts_gate, experts_up, experts_down;  // fused: gate holds gate and up
};

struct ModelSpec {
  std::string architecture;  // "Llama4ForCausalLM", …
  int64_t hidden = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t vocab = 0;
  int64_t max_context = 0;
  double norm_eps = 1e-5;
  bool tied_head = false;
  RopeSpec rope;
  int64_t attention_chunk = 0;   // positions; only for chunked layers
  double attention_scale = 0.1;  // of the temperature
  double floor_scale = 8192;
  std::vector<LayerSpec> layers;
  int64_t dense_ffn = 0;  // width of dense layers
  int experts = 0;
  int experts_per_token = 0;
  int64_t expert_ffn = 0;
  int64_t shared_ffn = 0;  // 0: no shared expert
  RouterKind router = RouterKind::sigmoid;
  WeightOn weight_on = WeightOn::input;
  TensorNames names;

  int moe_layers() const;
  int dense_layers() const { return static_cast<int>(layers.size()) - moe_layers(); }
};

// Keeps the first `count` layers, for benchmarks of a model that is too large as a whole.
void keep_layers(ModelSpec& spec, int count);

}  // namespace lighter::models
