// A model from tests/goldens, loaded as the command line loads it.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "models/checkpoint/safetensors.h"
#include "runtime/cli/session.h"

namespace lighter::test {

inline const std::filesystem::path kGoldens = std::filesystem::path(LIGHTER_SOURCE_DIR) / "tests/goldens";
inline const std::vector<std::string> kGoldenModels = {"llama4_scout", "llama4_text", "llama4_maverick",
                                                       "llama3",       "llama3_tied", "mixtral"};

// The device that tests run on: LIGHTER_TEST_DEVICE=cuda chooses the GPU.
DeviceConfig::Kind test_device();

Config golden_config(const std::string& name, DType dtype);

// Of all values together, in the root mean square.
double relative_error(const std::vector<float>& values, const std::vector<float>& reference);

// golden.safetensors of a folder: what transformers computed.
class Golden {
 public:
  explicit Golden(const std::string& name) : file_(kGoldens / name / "golden.safetensors") {}

  // Empty when there is no such tensor.
  template <typename T>
  std::vector<T> read(const std::string& name) const {
    for (const auto& tensor : file_.tensors()) {
      if (tensor.name != name) continue;
      std::vector<T> values(tensor.bytes / sizeof(T));
      file_.read_bytes(tensor, 0, tensor.bytes, values.data());
      return values;
    }
    return {};
  }

 private:
  models::SafetensorsFile file_;
};

struct LoadedModel {
  explicit LoadedModel(const Config& config, models::RoutingSchedule schedule = {});

  // Logits of every position, [n, vocab], with the prompt cut into steps of at most `chunk` tokens.
  std::vector<float> logits(const std::vector<int64_t>& ids, int64_t chunk);
  // The same, with only the first `prefill` tokens in such steps and the others one by one.
  std::vector<float> mixed_logits(const std::vector<int64_t>& ids, int64_t prefill, int64_t chunk);

  cli::PreparedModel model;
  cli::Session session;
};

}  // namespace lighter::test
