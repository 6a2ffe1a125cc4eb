// The supported architectures, each in a file of its own that holds only what differs.
#pragma once

#include <filesystem>

#include "models/config_reader.h"
#include "models/model_spec.h"

namespace lighter::models {

ModelSpec llama4_spec(const ConfigReader& config);   // Llama4ForConditionalGeneration, Llama4ForCausalLM
ModelSpec llama3_spec(const ConfigReader& config);   // LlamaForCausalLM
ModelSpec mixtral_spec(const ConfigReader& config);  // MixtralForCausalLM

// Chooses by "architectures", else "model_type". Throws CheckpointError for one that is not supported.
ModelSpec read_spec(const std::filesystem::path& config_json);

}  // namespace lighter::models
