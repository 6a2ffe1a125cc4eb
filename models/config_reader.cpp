#include "models/config_reader.h"

#include <fstream>

#include "runtime/error.h"

namespace lighter::models {
namespace {

// No field of a published model comes near: what is beyond is damage, and must not become an allocation.
constexpr int64_t kLargest = int64_t{1} << 30;
constexpr int64_t kMostLayers = 4096;

}  // namespace

const nlohmann::json* ConfigReader::find(const std::string& key) const {
  const auto found = object_.find(key);
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

bool ConfigReader::has(const std::string& key) const {
  return find(key) != nullptr;
}

void ConfigReader::fail(const std::string& message) const {
  throw CheckpointError(where_ + ": " + message);
}

int64_t ConfigReader::positive(const std::string& key, std::optional<int64_t> otherwise) const {
  const auto* value = find(key);
  if (value == nullptr) {
    if (otherwise) return *otherwise;
    fail("'" + key + "' is missing");
  }
  if (!value->is_number_integer() || value->get<int64_t>() < 1 || value->get<int64_t>() > kLargest) {
    fail("'" + key + "' is " + value->dump() + ", but must be an integer from 1 to " +
         std::to_string(kLargest));
  }
  return value->get<int64_t>();
}

int64_t ConfigReader::layers() const {
  const int64_t count = positive("num_hidden_layers");
  if (count > kMostLayers) {
    fail("'num_hidden_layers' is " + std::to_string(count) + "; at most " + std::to_string(kMostLayers) +
         " are supported");
  }
  return count;
}

double ConfigReader::number(const std::string& key, std::optional<double> otherwise) const {
  const auto* value = find(key);
  if (value == nullptr) {
    if (otherwise) return *otherwise;
    fail("'" + key + "' is missing");
  }
  if (!value->is_number()) fail("'" + key + "' is " + value->dump() + ", but must be a number");
  return value->get<double>();
}

bool ConfigReader::flag(const std::string& key, bool otherwise) const {
  const auto* value = find(key);
  if (value == nullptr) return otherwise;
  if (value->is_boolean()) return value->get<bool>();
  if (value->is_number_integer()) return value->get<int64_t>() != 0;
  fail("'" + key + "' is " + value->dump() + ", but must be true or false");
}

std::string ConfigReader::text(const std::string& key, const std::string& otherwise) const {
  const auto* value = find(key);
  if (value == nullptr) return otherwise;
  if (!value->is_string()) fail("'" + key + "' is " + value->dump() + ", but must be a string");
  return value->get<std::string>();
}

std::vector<int64_t> ConfigReader::integers(const std::string& key) const {
  const auto* value = find(key);
  if (value == nullptr) return {};
  try {
    return value->get<std::vector<int64_t>>();
  } catch (const nlohmann::json::exception&) {
    fail("'" + key + "' must be a list of integers");
  }
}

std::vector<std::string> ConfigReader::texts(const std::string& key) const {
  const auto* value = find(key);
  if (value == nullptr) return {};
  try {
    return value->get<std::vector<std::string>>();
  } catch (const nlohmann::json::exception&) {
    fail("'" + key + "' must be a list of strings");
  }
}

ConfigReader ConfigReader::object(const std::string& key) const {
  const auto* value = find(key);
  if (value == nullptr || !value->is_object()) fail("'" + key + "' must be an object");
  return {*value, where_ + ": " + key};
}

void ConfigReader::require(const std::string& key, const nlohmann::json& value) const {
  const auto* found = find(key);
  if (found != nullptr && *found != value) {
    fail("'" + key + "' is " + found->dump() + "; only " + value.dump() + " is supported");
  }
}

ConfigReader read_config(const std::filesystem::path& file) {
  std::ifstream in(file);
  if (!in) throw CheckpointError(file.string() + ": cannot be read; a model folder holds a config.json");
  try {
    nlohmann::json parsed = nlohmann::json::parse(in);
    if (!parsed.is_object()) throw CheckpointError(file.string() + ": is not a JSON object");
    return {std::move(parsed), file.string()};
  } catch (const nlohmann::json::exception& failure) {
    throw CheckpointError(file.string() + ": is not valid JSON: " + failure.what());
  }
}

RopeSpec read_rope(const ConfigReader& config, double default_theta) {
  RopeSpec rope;
  rope.theta = config.number("rope_theta", default_theta);
  const char* key = config.has("rope_scaling") ? "rope_scaling" : "rope_parameters";
  if (!config.has(key)) return rope;
  const ConfigReader parameters = config.object(key);
  rope.theta = parameters.number("rope_theta", rope.theta);
  const std::string type = parameters.text("rope_type", parameters.text("type", "default"));
  if (type == "default") return rope;
  if (type != "llama3") parameters.fail("rope_type '" + type + "' is not supported; llama3 and default are");
  RopeScaling scaling;
  scaling.factor = parameters.number("factor");
  scaling.low_freq_factor = parameters.number("low_freq_factor");
  scaling.high_freq_factor = parameters.number("high_freq_factor");
  scaling.original_context =
      parameters.number("original_max_position_embeddings", config.number("max_position_embeddings", 8192));
  if (scaling.factor <= 0 || scaling.low_freq_factor <= 0 ||
      scaling.high_freq_factor < scaling.low_freq_factor) {
    parameters.fail(
        "factor and low_freq_factor must be above 0, and high_freq_factor not below low_freq_factor");
  }
  rope.scaling = scaling;
  return rope;
}

void check_spec(const ModelSpec& spec, const ConfigReader& config) {
  if (spec.heads % spec.kv_heads != 0) {
    config.fail(std::to_string(spec.heads) + " attention heads cannot share " +
                std::to_string(spec.kv_heads) + " key/value heads");
  }
  if (spec.head_dim % 2 != 0) config.fail("head_dim " + std::to_string(spec.head_dim) + " is odd");
  if (spec.moe_layers() > 0 && spec.experts_per_token > spec.experts) {
    config.fail("num_experts_per_tok " + std::to_string(spec.experts_per_token) + " is more than the " +
                std::to_string(spec.experts) + " experts");
  }
  config.require("hidden_act", "silu");
  check_quantization(config);
}

void check_quantization(const ConfigReader& config) {
  if (!config.has("quantization_config")) return;
  const std::string method = config.object("quantization_config").text("quant_method", "an unnamed method");
  if (method == "lighter") return;
  config.fail("the checkpoint is quantized (quantization_config, by " + method +
              "); only fp32, fp16 and bf16 weights are read, and what lighter quantize writes: use the "
              "unquantized checkpoint");
}

}  // namespace lighter::models
