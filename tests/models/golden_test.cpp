// Logits against transformers, on small random checkpoints in the published format (tests/goldens).
#include <doctest/doctest.h>

#include <cmath>

#include "runtime/engine/generator.h"
#include "tests/models/test_model.h"

namespace {

using namespace lighter;
using namespace lighter::test;

// Of the largest logit. transformers differs from itself by 1.2e-6 between its own attention implementations.
constexpr double kFp32Tolerance = 1e-5;

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
  for (size_t i = 0; i < values.size(); ++i)
    sum += std::pow(static_cast<double>(values[i]) - reference[i], 2);
  return std::sqrt(sum / static_cast<double>(values.size()));
}

}  // namespace

TEST_CASE("fp32 logits equal those of transformers, however the prompt is cut into steps") {
  for (const auto& name : kGoldenModels) {
    CAPTURE(name);
    const Golden golden(name);
    const auto ids = golden.read<int64_t>("input_ids");
    const auto reference = golden.read<float>("logits");
    LoadedModel run(golden_config(name, DType::fp32));
    for (const int64_t chunk : {int64_t{1000}, int64_t{7}, int64_t{1}}) {
      CAPTURE(chunk);
      CHECK(largest_error(run.logits(ids, chunk), reference) <= kFp32Tolerance);
    }
  }
}

TEST_CASE("bf16 logits are as near to the fp32 truth as those of transformers, with the same routing") {
  for (const auto& name : kGoldenModels) {
    CAPTURE(name);
    const Golden golden(name);
    const auto ids = golden.read<int64_t>("input_ids");
    const auto truth = golden.read<float>("logits");
    const auto theirs = golden.read<float>("logits_bf16");
    const Config config = golden_config(name, DType::bf16);
    const auto routing = golden.read<int32_t>("routing");
    const int k = cli::prepare(config).spec.experts_per_token;
    models::RoutingSchedule forced;
    if (!routing.empty()) forced = models::recorded_schedule(routing, static_cast<int64_t>(ids.size()), k);
    LoadedModel run(config, forced);
    const auto ours = run.logits(ids, 1000);
    CHECK(rms_error(ours, truth) <= 1.5 * rms_error(theirs, truth));
    CHECK(largest_error(ours, truth) <= 1.5 * largest_error(theirs, truth));
  }
}

TEST_CASE("greedy continuation equals that of transformers") {
  for (const auto& name : kGoldenModels) {
    CAPTURE(name);
    const Golden golden(name);
    LoadedModel run(golden_config(name, DType::fp32));
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
