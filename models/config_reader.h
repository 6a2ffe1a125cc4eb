// Reads fields of a Hugging Face config.json. Every error names the file and the field.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "models/model_spec.h"

namespace lighter::models {

// A JSON object of a config, with the path that leads to it for messages. Copies are cheap enough.
class ConfigReader {
 public:
  ConfigReader(nlohmann::json object, std::string where)
      : object_(std::move(object)), where_(std::move(where)) {}

  // Absent and null count as not there. CheckpointError for a wrong type or a missing field without default.
  int64_t positive(const std::string& key, std::optional<int64_t> otherwise = std::nullopt) const;
  // num_hidden_layers, within what can be believed.
  int64_t layers() const;
  double number(const std::string& key, std::optional<double> otherwise = std::nullopt) const;
  // Some published configs write flags as integers: nonzero is true.
  bool flag(const std::string& key, bool otherwise) const;
  std::string text(const std::string& key, const std::string& otherwise) const;
  std::vector<int64_t> integers(const std::string& key) const;   // empty when absent
  std::vector<std::string> texts(const std::string& key) const;  // empty when absent
  bool has(const std::string& key) const;
  ConfigReader object(const std::string& key) const;

  [[noreturn]] void fail(const std::string& message) const;
  // Fails when the field is there with another value: what the graph does not compute must not be ignored.
  void require(const std::string& key, const nlohmann::json& value) const;

 private:
  const nlohmann::json* find(const std::string& key) const;

  nlohmann::json object_;
  std::string where_;
};

ConfigReader read_config(const std::filesystem::path& file);

// rope_parameters (transformers 5), or rope_theta and rope_scaling (as published before). Throws for scaling
// types other than llama3.
RopeSpec read_rope(const ConfigReader& config, double default_theta);

// Throws CheckpointError for a config of weights that something other than `lighter quantize` has quantized.
void check_quantization(const ConfigReader& config);

// Checks that hold for every architecture. Throws CheckpointError.
void check_spec(const ModelSpec& spec, const ConfigReader& config);

}  // namespace lighter::models
