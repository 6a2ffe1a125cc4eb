#include "tests/models/test_model.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace lighter::test {

DeviceConfig::Kind test_device() {
  const char* name = std::getenv("LIGHTER_TEST_DEVICE");
  return name != nullptr && std::string(name) == "cuda" ? DeviceConfig::Kind::cuda : DeviceConfig::Kind::cpu;
}

Config golden_config(const std::string& name, DType dtype) {
  Config config;
  config.model.path = kGoldens / name;
  config.model.dtype = dtype;
  config.device.kind = test_device();
  const bool cuda = config.device.kind == DeviceConfig::Kind::cuda;
  config.memory.gpu_budget_bytes = uint64_t{cuda ? 2048u : 64u} << 20;
  config.memory.host_budget_bytes = uint64_t{256} << 20;
  config.memory.context = 128;
  config.memory.kv_block = 16;
  config.offload.resident = 0.5;
  config.offload.slice_width = 32;
  config.cpu.threads = 2;
  return config;
}

LoadedModel::LoadedModel(const Config& config, models::RoutingSchedule schedule)
    : model(cli::prepare(config)), session(config, model, kNoProgress, {std::move(schedule), {}}) {}

std::vector<float> LoadedModel::logits(const std::vector<int64_t>& ids, int64_t chunk) {
  std::vector<float> all;
  auto& decoder = session.decoder();
  decoder.release(0);
  const auto length = static_cast<int64_t>(ids.size());
  for (int64_t begin = 0; begin < length;) {
    const int64_t count = std::min({chunk, decoder.max_tokens_from(begin), length - begin});
    Step step;
    step.add(0, begin, ids.data() + begin, count);
    step.all_logits = true;
    const at::Tensor out = decoder.forward(step).contiguous();
    all.insert(all.end(), out.const_data_ptr<float>(), out.const_data_ptr<float>() + out.numel());
    begin += count;
  }
  return all;
}

std::vector<float> LoadedModel::mixed_logits(const std::vector<int64_t>& ids, int64_t prefill,
                                             int64_t chunk) {
  std::vector<float> all = logits({ids.begin(), ids.begin() + prefill}, chunk);
  for (auto i = static_cast<size_t>(prefill); i < ids.size(); ++i) {
    Step step;
    step.add(0, static_cast<int64_t>(i), &ids[i], 1);
    const at::Tensor out = session.decoder().forward(step).contiguous();
    all.insert(all.end(), out.const_data_ptr<float>(), out.const_data_ptr<float>() + out.numel());
  }
  return all;
}

double relative_error(const std::vector<float>& values, const std::vector<float>& reference) {
  REQUIRE(values.size() == reference.size());
  double error = 0, size = 0;
  for (size_t i = 0; i < reference.size(); ++i) {
    error += std::pow(static_cast<double>(values[i]) - reference[i], 2);
    size += std::pow(static_cast<double>(reference[i]), 2);
  }
  return std::sqrt(error / size);
}

}  // namespace lighter::test
