// The JSON Schema (draft 2020-12) of the YAML files, made from the table of keys. Pure; thread-safe.
#pragma once

#include <nlohmann/json.hpp>

namespace lighter {

// configs/lighter.schema.json is exactly config_schema().dump(2) and a newline.
nlohmann::json config_schema();

}  // namespace lighter
