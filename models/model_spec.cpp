#include "models/model_spec.h"

#include <algorithm>

#include "runtime/error.h"

namespace lighter::models {

int ModelSpec::moe_layers() const {
  return static_cast<int>(std::count_if(layers.begin(), layers.end(),
                                        [](const LayerSpec& layer) { return layer.moe_layer >= 0; }));
}

void keep_layers(ModelSpec& spec, int count) {
  if (count < 1 || count > static_cast<int>(spec.layers.size())) {
    throw ConfigError("model.layers is " + std::to_string(count) + ", but " + spec.architecture + " has " +
                      std::to_string(spec.layers.size()) + " layers");
  }
  spec.layers.resize(count);
}

}  // namespace lighter::models
