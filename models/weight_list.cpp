#include "models/weights.h"

namespace lighter::models {

const char* weight_class_name(WeightClass weight_class) {
  switch (weight_class) {
    case WeightClass::embedding:
      return "embedding";
    case WeightClass::attention:
      return "attention";
    case WeightClass::norms:
      return "norms";
    case WeightClass::router:
      return "router";
    case WeightClass::shared_expert:
      return "shared experts";
    case WeightClass::dense_ffn:
      return "dense FFN";
    case WeightClass::head:
      return "head";
  }
  return "?";
}

std::vector<int64_t> TensorPart::shape() const {
  if (columns == 0) return {rows};
  return {rows, columns};
}

std::vector<int64_t> Weight::shape() const {
  auto shape = parts.front().shape();
  for (size_t i = 1; i < parts.size(); ++i) shape[0] += parts[i].rows;
  return shape;
}

int64_t Weight::elements() const {
  int64_t sum = 0;
  for (const TensorPart& part : parts) sum += part.elements();
  return sum;
}

std::string fill_name(const std::string& pattern, int layer, int expert) {
  std::string name = pattern;
  const auto replace = [&](const std::string& mark, int value) {
    if (const auto at = name.find(mark); at != std::string::npos)
      name.replace(at, mark.size(), std::to_string(value));
  };
  replace("{}", layer);
  if (expert >= 0) replace("{e}", expert);
  return name;
}

std::vector<Weight> list_weights(const ModelSpec& spec) {
  const TensorNames& names = spec.names;
  const int64_t hidden = spec.hidden;
  const int64_t q_rows = spec.heads * spec.head_dim;
  const int64_t kv_rows = spec.kv_heads * spec.head_dim;
  std::vector<Weight> weights;
  const auto add = [&](WeightRole role, WeightClass weight_class, int layer, std::vector<TensorPart> parts) {
    for (TensorPart& part : parts) part.name = fill_name(part.name, layer);
    weights.push_back({role, weight_class, layer, std::move(parts)});
  };
  using enum WeightRole;
  if (!spec.tied_head) add(embedding, WeightClass::embedding, -1, {{names.embedding, spec.vocab, hidden}});
  for (int i = 0; i < static_cast<int>(spec.layers.size()); ++i) {
    add(attention_norm, WeightClass::norms, i, {{names.attention_norm, hidden}});
    add(qkv, WeightClass::attention, i,
        {{names.q, q_rows, hidden}, {names.k, kv_rows, hidden}, {names.v, kv_rows, hidden}});
    add(o, WeightClass::attention, i, {{names.o, hidden, q_rows}});
    add(ffn_norm, WeightClass::norms, i, {{names.ffn_norm, hidden}});
    if (spec.layers[i].moe_layer < 0) {
      add(dense_gate_up, WeightClass::dense_ffn, i,
          {{names.dense_gate, spec.dense_ffn, hidden}, {names.dense_up, spec.dense_ffn, hidden}});
      add(dense_down, WeightClass::dense_ffn, i, {{names.dense_down, hidden, spec.dense_ffn}});
      continue;
    }
    add(router, WeightClass::router, i, {{names.router, spec.experts, hidden}});
    if (spec.shared_ffn == 0) continue;
    add(shared_gate_up, WeightClass::shared_expert, i,
        {{names.shared_gate, spec.shared_ffn, hidden}, {names.shared_up, spec.shared_ffn, hidden}});
    add(shared_down, WeightClass::shared_expert, i, {{names.shared_down, hidden, spec.shared_ffn}});
  }
  add(final_norm, WeightClass::norms, -1, {{names.final_norm, hidden}});
  add(head, WeightClass::head, -1, {{spec.tied_head ? names.embedding : names.head, spec.vocab, hidden}});
  return weights;
}

}  // namespace lighter::models
