#include "models/stored_formats.h"

#include "models/config_reader.h"
#include "runtime/config/layer_formats.h"
#include "runtime/error.h"

namespace lighter::models {
namespace {

using nlohmann::json;

constexpr const char* kEntry = "quantization_config";
constexpr int64_t kVersion = 1;

SliceEncoding format_of(const ConfigReader& entry, const std::string& key, const std::string& name) {
  for (const auto encoding : {SliceEncoding::dense, SliceEncoding::int8, SliceEncoding::int4}) {
    if (name == format_name(encoding)) return encoding;
  }
  entry.fail("'" + key + "' has '" + name + "', but formats are dtype, int8 and int4");
}

std::vector<SliceEncoding> formats_of(const ConfigReader& entry, const std::string& key, size_t layers) {
  std::vector<SliceEncoding> formats;
  for (const std::string& name : entry.texts(key)) formats.push_back(format_of(entry, key, name));
  if (formats.size() != layers) {
    entry.fail("'" + key + "' lists " + std::to_string(formats.size()) + " formats, but the model has " +
               std::to_string(layers) + " layers");
  }
  return formats;
}

json names_of(const std::vector<SliceEncoding>& formats) {
  json names = json::array();
  for (const SliceEncoding encoding : formats) names.push_back(format_name(encoding));
  return names;
}

std::vector<int64_t> packed_shape(const PackedWeight& form) {
  if (form.is_ffn()) return {form.slices, static_cast<int64_t>(form.slice_bytes())};
  return {static_cast<int64_t>(form.bytes())};
}

std::vector<int64_t> packed_experts_shape(const StoredFormats& formats, const ModelSpec& spec) {
  const int64_t width = formats.weights.slice_width;
  return {spec.experts, spec.expert_ffn / width,
          static_cast<int64_t>(packed_slice_bytes(formats.experts, spec.hidden, width))};
}

void add_published_experts(const ModelSpec& spec, int layer, std::vector<FolderTensor>& tensors) {
  const auto& names = spec.names;
  const int64_t hidden = spec.hidden, ffn = spec.expert_ffn;
  if (names.layout == ExpertLayout::fused_in_out) {
    tensors.push_back({fill_name(names.experts_gate, layer), {spec.experts, hidden, 2 * ffn}, layer, false});
    tensors.push_back({fill_name(names.experts_down, layer), {spec.experts, ffn, hidden}, layer, false});
    return;
  }
  for (int expert = 0; expert < spec.experts; ++expert) {
    tensors.push_back({fill_name(names.experts_gate, layer, expert), {ffn, hidden}, layer, false});
    tensors.push_back({fill_name(names.experts_up, layer, expert), {ffn, hidden}, layer, false});
    tensors.push_back({fill_name(names.experts_down, layer, expert), {hidden, ffn}, layer, false});
  }
}

}  // namespace

std::optional<StoredFormats> read_stored_formats(const std::filesystem::path& config_json,
                                                 const ModelSpec& spec) {
  const ConfigReader config = read_config(config_json);
  if (!config.has(kEntry)) return std::nullopt;
  const ConfigReader entry = config.object(kEntry);
  if (entry.positive("version") != kVersion) {
    entry.fail("written by a later lighter, in version " + std::to_string(entry.positive("version")) +
               "; this one reads version " + std::to_string(kVersion));
  }
  StoredFormats stored;
  stored.weights = dense_formats(spec, DType::bf16);
  stored.weights.shared = formats_of(entry, "shared", spec.layers.size());
  stored.weights.attention = formats_of(entry, "attention", spec.layers.size());
  stored.weights.head = format_of(entry, "head", entry.text("head", ""));
  stored.weights.slice_width = 0;
  if (spec.moe_layers() > 0) {
    stored.experts = format_of(entry, "experts", entry.text("experts", ""));
    stored.weights.slice_width = entry.positive("slice_width");
    if (spec.expert_ffn % stored.weights.slice_width != 0) {
      entry.fail("'slice_width' is " + std::to_string(stored.weights.slice_width) +
                 ", which does not divide the experts' FFN width of " + std::to_string(spec.expert_ffn));
    }
  }
  return stored;
}

json stored_formats_entry(const StoredFormats& formats, const ModelSpec& spec) {
  json entry = {{"quant_method", "lighter"},
                {"version", kVersion},
                {"shared", names_of(formats.weights.shared)},
                {"attention", names_of(formats.weights.attention)},
                {"head", format_name(formats.weights.head)}};
  if (spec.moe_layers() > 0) {
    entry["experts"] = format_name(formats.experts);
    entry["slice_width"] = formats.weights.slice_width;
  }
  return entry;
}

std::string packed_name(const Weight& weight) {
  const auto in_layer = [&](const char* name) {
    return "packed." + std::to_string(weight.layer) + "." + name;
  };
  switch (weight.role) {
    case WeightRole::qkv:
      return in_layer("qkv");
    case WeightRole::o:
      return in_layer("o");
    case WeightRole::shared_gate_up:
      return in_layer("shared");
    case WeightRole::dense_gate_up:
      return in_layer("ffn");
    case WeightRole::head:
      return "packed.head";
    default:
      throw ConfigError("a weight of the class " + std::string(weight_class_name(weight.weight_class)) +
                        " is never packed");
  }
}

std::string packed_experts_name(int layer) {
  return "packed." + std::to_string(layer) + ".experts";
}

std::vector<FolderTensor> folder_tensors(const ModelSpec& spec, const StoredFormats* formats) {
  std::vector<FolderTensor> tensors;
  for (const Weight& weight : list_weights(spec)) {
    if (formats == nullptr || formats->weights.of(weight) == SliceEncoding::dense) {
      for (const TensorPart& part : weight.parts)
        tensors.push_back({part.name, part.shape(), weight.layer, false});
    } else if (weight_bytes(formats->weights, weight) > 0) {
      tensors.push_back(
          {packed_name(weight), packed_shape(packed_form(formats->weights, weight)), weight.layer, true});
    }
  }
  for (int layer = 0; layer < static_cast<int>(spec.layers.size()); ++layer) {
    if (spec.layers[layer].moe_layer < 0) continue;
    if (formats != nullptr && formats->experts != SliceEncoding::dense) {
      tensors.push_back({packed_experts_name(layer), packed_experts_shape(*formats, spec), layer, true});
    } else {
      add_published_experts(spec, layer, tensors);
    }
  }
  return tensors;
}

}  // namespace lighter::models
