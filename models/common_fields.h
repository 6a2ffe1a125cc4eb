// What the configurations and tensor names of Llama 3 and Mixtral have in common.
#pragma once

#include "models/config_reader.h"
#include "models/model_spec.h"

namespace lighter::models {

// The defaults of fields that a config.json may leave out.
struct FieldDefaults {
  std::optional<int64_t> kv_heads;  // none: as many as query heads
  int64_t max_context = 2048;
  double norm_eps = 1e-6;
  double rope_theta = 10000;
};

ModelSpec read_common_fields(const ConfigReader& config, const FieldDefaults& defaults);

}  // namespace lighter::models
