// Which files of a Hugging Face model folder hold its weights, and which tensors they should hold.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace lighter::models {

struct ModelFolder {
  std::vector<std::string> files;                 // names of the safetensors files in the folder
  std::map<std::string, std::string> weight_map;  // tensor -> file, from the index; empty without one
};

// Looks only at the names in the folder and at the index. model.safetensors is taken if it is there, as
// transformers does. CheckpointError if the folder is missing or holds no safetensors weights (it names
// what it holds instead), if the index is damaged, or if files that it names are missing (all of them).
ModelFolder inspect_model_folder(const std::filesystem::path& dir);

}  // namespace lighter::models
