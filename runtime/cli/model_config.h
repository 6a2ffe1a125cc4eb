// A configuration together with what its model's folder says of itself.
#pragma once

#include <filesystem>
#include <span>
#include <string>

#include "runtime/config/config.h"

namespace lighter::cli {

// load_config(); for a folder that `lighter quantize` wrote, weight formats and slice width are the folder's.
// Throws ConfigError where the configuration asks for others, CheckpointError for a folder that cannot be
// read.
Config load_model_config(const std::filesystem::path& file, std::span<const std::string> overrides);

}  // namespace lighter::cli
