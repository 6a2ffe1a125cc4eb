// Logits against transformers, on small random checkpoints in the published format (tests/goldens).
#include <doctest/doctest.h>

#include <filesystem>
#include <map>

#include "models/checkpoint/checkpoint.h"
#include "models/checkpoint/safetensors.h"
#include "runtime/cli/session.h"
#include "runtime/engine/generator.h"

namespace {

using namespace lighter;

const std::filesystem::path kGoldens = std::filesystem::path(LIGHTER_SOURCE_DIR) / "tests/goldens";

struct Golden {
  explicit Golden(const std::filesystem::path& dir) : file(dir / "golden.safetensors") {}

  template <typename T>
  std::vector<T> read(const std::string& name) const {
    for (const auto& tensor : file.tensors()) {
      if (tensor.name != name) continue;
      std::vector<T> values(tensor.bytes / sizeof(T));
      file.read_bytes(tensor, 0, tensor.bytes, values.data());
      return values;
    }
    return {};
  }

  models::SafetensorsFile file;
};

Config config_for(const std::string& name, DType dtype) {
  Config config;
  config.model.path = kGoldens / name;
  config.model.dtype = dtype;
  config.device.kind = DeviceConfig::Kind::cpu;
  config.memory = {uint64_t{64} << 20, uint64_t{64} << 20, 128, 0, 16};
  config.offload.resident = 0.5;
  config.offload.slice_width = 32;
  config.cpu.threads = 2;
  return config;
}

struct Run {
  Run(const Config& config, models::RoutingSchedule schedule = {})
      : model(cli::prepare(config)), session(config, model, [](auto&&...) {}, std::move(schedule)) {}

  // Logits of every position, [n, vocab], with the prompt cut into steps of at most `chunk` tokens.
  std::vector<float> logits(const std::vector<int64_t>& ids, int64_t chunk) {
    std::vector<float> all;
    session.decoder().release(0);
    for (int64_t begin = 0; begin < static_cast<int64_t>(ids.size());) {
      const int64_t count = std::min({chunk, session.decoder().max_tokens_from(begin),
                                      static_cast<int64_t>(ids.size()) - begin});
      Step step;
      step.add(0, begin, ids.data() + begin, count);
      step.all_logits = true;
      const at::Tensor out = session.decoder().forward(step).contiguous();
      all.insert(all.end(), out.const_data_ptr<float>(), out.const_data_ptr<float>() + out.numel());
      begin += count;
    }
    return all;
  }

  cli::PreparedModel model;
  cli::Session session;
};

double largest_error(const std::vector<float>& values, const std::vector<float>& reference) {
  REQUIRE(values.size() == reference.size());
  double error = 0;
  double largest = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    error = std::max<double>(error, std::abs(values[i] - reference[i]));
    largest = std::max<double>(largest, std::abs(reference[i]));
  }
  return error / largest;
}

double rms_error(const std::vector<float>& values, const std::vector<float>& reference) {
  REQUIRE(values.size() == reference.size());
  double sum = 0;
  for (size_t i = 0; i < values.size(); ++i) sum += std::pow(static_cast<double>(values[i]) - reference[i], 2);
  return std::sqrt(sum / static_cast<double>(values.size()));
}

const std::vector<std::string> kCases = {"llama4_scout", "llama4_text", "llama4_maverick",
                                         "llama3",       "llama3_tied", "mixtral"};

}  // namespace

TEST_CASE("fp32 logits equal those of transformers, however the prompt is cut into steps") {
  for (const auto& name : kCases) {
    CAPTURE(name);
    const Golden golden(kGoldens / name);
    const auto ids = golden.read<int64_t>("input_ids");
    const auto reference = golden.read<float>("logits");
    Run run(config_for(name, DType::fp32));
    for (const int64_t chunk : {int64_t{1000}, int64_t{7}, int64_t{1}}) {
      CAPTURE(chunk);
      CHECK(largest_error(run.logits(ids, chunk), reference) <= 1e-5);
    }
  }
}

TEST_CASE("bf16 logits are as near to the fp32 truth as those of transformers, with the same routing") {
  for (const auto& name : kCases) {
    CAPTURE(name);
    const Golden golden(kGoldens / name);
    const auto ids = golden.read<int64_t>("input_ids");
    const auto truth = golden.read<float>("logits");
    const auto theirs = golden.read<float>("logits_bf16");
    const Config config = config_for(name, DType::bf16);
    const auto routing = golden.read<int32_t>("routing");
    const int k = cli::prepare(config).spec.experts_per_token;
    models::RoutingSchedule forced;
    if (!routing.empty()) forced = models::recorded_schedule(routing, static_cast<int64_t>(ids.size()), k);
    Run run(config, forced);
    const auto ours = run.logits(ids, 1000);
    CHECK(rms_error(ours, truth) <= 1.5 * rms_error(theirs, truth));
    CHECK(largest_error(ours, truth) <= 1.5 * largest_error(theirs, truth));
  }
}

TEST_CASE("greedy continuation equals that of transformers") {
  for (const auto& name : kCases) {
    CAPTURE(name);
    const Golden golden(kGoldens / name);
    Run run(config_for(name, DType::fp32));
    const std::atomic<bool> never{false};
    Generator generator(run.session.decoder(), nullptr, never);
    GenerateRequest request;
    request.prompt = golden.read<int64_t>("input_ids");
    request.max_tokens = 16;
    request.prefill_chunk = 11;
    const auto result = generator.generate(request, [](const std::string&) {});
    CHECK(result.ids == golden.read<int64_t>("greedy_ids"));
  }
}
