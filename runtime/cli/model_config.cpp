#include "runtime/cli/model_config.h"

#include "models/architectures.h"
#include "models/stored_formats.h"
#include "runtime/error.h"

namespace lighter::cli {
namespace {

class Adoption {
 public:
  Adoption(ModelConfig& model, const models::StoredFormats& stored) : model_(model), stored_(stored) {}

  void all(bool has_experts) {
    if (has_experts) one("experts", model_.experts, stored_.experts);
    model_.experts = stored_.experts;
    by_layer("shared", model_.shared, stored_.weights.shared);
    by_layer("attention", model_.attention, stored_.weights.attention);
    one("head", model_.head, stored_.weights.head);
    model_.format = model_.experts;
  }

 private:
  void check(const std::string& key, SliceEncoding asked, SliceEncoding has) const {
    if (!model_.formats_given || asked == has) return;
    throw ConfigError("model." + key + " is " + std::string(format_name(asked)) + ", but " +
                      model_.path.string() + " holds " + std::string(format_name(has)) +
                      "; leave the formats out, or give the folder that it was quantized from");
  }
  void one(const std::string& key, SliceEncoding& asked, SliceEncoding has) const {
    check(key, asked, has);
    asked = has;
  }
  void by_layer(const std::string& key, LayerFormats& asked, const std::vector<SliceEncoding>& has) const {
    LayerFormats formats;
    for (int layer = 0; layer < static_cast<int>(has.size()); ++layer) {
      check(key + ", layer " + std::to_string(layer), asked.at(layer), has[layer]);
      formats.rules.push_back({{false, {{layer, layer}}}, has[layer]});
    }
    asked = formats;
  }

  ModelConfig& model_;
  const models::StoredFormats& stored_;
};

}  // namespace

Config load_model_config(const std::filesystem::path& file, std::span<const std::string> overrides) {
  Config config = load_config(file, overrides);
  if (config.model.is_synthetic()) return config;
  const std::filesystem::path described = config.model.path / "config.json";
  const models::ModelSpec spec = models::read_spec(described);
  const auto stored = models::read_stored_formats(described, spec);
  if (!stored) return config;
  const int64_t width = stored->weights.slice_width;
  if (width != 0 && config.offload.slice_width != 0 && config.offload.slice_width != width) {
    throw ConfigError("offload.slice_width is " + std::to_string(config.offload.slice_width) + ", but " +
                      config.model.path.string() + " holds slices of " + std::to_string(width) +
                      "; leave it out, or quantize the model anew with this width");
  }
  Adoption(config.model, *stored).all(spec.moe_layers() > 0);
  if (width != 0) config.offload.slice_width = width;
  return config;
}

}  // namespace lighter::cli
