// Checkpoint folders of small models whose shapes every weight format fits: a golden's configuration,
// widened, with random weights; and what tests do with such models.
#pragma once

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "models/architectures.h"
#include "models/checkpoint/safetensors_writer.h"
#include "models/synthetic_source.h"
#include "tests/models/checkpoint_folder.h"
#include "tests/models/test_model.h"

namespace lighter::test {

struct SmallSizes {
  int64_t hidden = 128, ffn = 512, dense_ffn = 768, head_dim = 32;
  int64_t heads = 0, kv_heads = 0;  // 0: the golden's
};

struct SmallCheckpoint {
  explicit SmallCheckpoint(const std::string& golden, const SmallSizes& sizes = {}) {
    std::ifstream in(kGoldens / golden / "config.json");
    nlohmann::json config = nlohmann::json::parse(in);
    auto& text = config.contains("text_config") ? config["text_config"] : config;
    text.update({{"hidden_size", sizes.hidden},
                 {"intermediate_size", sizes.ffn},
                 {"head_dim", sizes.head_dim},
                 {"tie_word_embeddings", false}});
    if (sizes.heads > 0) {
      text["num_attention_heads"] = sizes.heads;
      text["num_key_value_heads"] = sizes.kv_heads;
    }
    if (text.contains("intermediate_size_mlp")) text["intermediate_size_mlp"] = sizes.dense_ffn;
    models::testing::write_text(folder / "config.json", config.dump());
    spec = models::read_spec(folder / "config.json");

    models::SafetensorsWriter writer(folder / "model.safetensors");
    std::vector<models::TensorPart> parts;
    for (const auto& weight : models::list_weights(spec)) {
      for (const auto& part : weight.parts) parts.push_back(part);
    }
    for (int i = 0; i < static_cast<int>(spec.layers.size()); ++i) {
      if (spec.layers[i].moe_layer >= 0) add_experts(i, parts);
    }
    const auto bf16 = models::StoredType::bf16;
    for (const auto& part : parts) writer.declare(part.name, bf16, shape_of(part));
    const models::SyntheticSource source(spec, DType::bf16, SliceEncoding::dense, 1, 3);
    for (const auto& part : parts) {
      std::vector<uint16_t> values(part.elements());
      source.read(part, 0, part.elements(), DType::bf16, values.data());
      writer.append(part.name, values.data(), values.size() * sizeof(uint16_t));
    }
    writer.finish();
  }

  Config config(DType dtype) const {
    Config config = golden_config("", dtype);
    config.model.path = folder.path();
    config.offload.slice_width = 256;
    return config;
  }

  models::testing::TempFolder folder;
  models::ModelSpec spec;

 private:
  // Fused experts are one matrix [experts · rows, columns] here: what is random has no rows to confuse.
  void add_experts(int layer, std::vector<models::TensorPart>& parts) const {
    const auto& names = spec.names;
    const bool fused = names.layout == models::ExpertLayout::fused_in_out;
    const int64_t ffn = spec.expert_ffn;
    if (fused) {
      parts.push_back({models::fill_name(names.experts_gate, layer), spec.experts * spec.hidden, 2 * ffn});
      parts.push_back({models::fill_name(names.experts_down, layer), spec.experts * ffn, spec.hidden});
    }
    for (int expert = 0; expert < spec.experts && !fused; ++expert) {
      parts.push_back({models::fill_name(names.experts_gate, layer, expert), ffn, spec.hidden});
      parts.push_back({models::fill_name(names.experts_up, layer, expert), ffn, spec.hidden});
      parts.push_back({models::fill_name(names.experts_down, layer, expert), spec.hidden, ffn});
    }
  }

  std::vector<int64_t> shape_of(const models::TensorPart& part) const {
    const bool fused = part.name.find(".experts.") != std::string::npos &&
                       spec.names.layout == models::ExpertLayout::fused_in_out;
    if (!fused) return part.shape();
    return {spec.experts, part.rows / spec.experts, part.columns};
  }
};

inline std::vector<int64_t> some_ids(int64_t vocab) {
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < 44; ++i) ids.push_back((i * i * 7 + 3 * i + 1) % vocab);
  return ids;
}

// A prefill of many tokens, one of few, then single ones: every way to multiply.
inline std::vector<float> mixed_logits(LoadedModel& model, const std::vector<int64_t>& ids) {
  return model.mixed_logits(ids, 36, 27);
}

inline void set_format(Config& config, SliceEncoding format) {
  config.model.format = config.model.experts = config.model.head = format;
  config.model.shared = config.model.attention = {format, {}};
}

}  // namespace lighter::test
