// `lighter eval`: perplexity as transformers computes it (golden.json is tests/check_eval.py's).
#include <doctest/doctest.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "runtime/cli/perplexity.h"
#include "runtime/error.h"
#include "tests/models/test_model.h"
#include "tests/runtime/yaml_file.h"

using namespace lighter;
using namespace lighter::cli;
using namespace lighter::test;

namespace {

const std::filesystem::path kFolder = std::filesystem::path(LIGHTER_SOURCE_DIR) / "tests/cli/eval";

nlohmann::json golden() {
  std::ifstream in(kFolder / "golden.json");
  return nlohmann::json::parse(in);
}

TextWindows windows(int64_t context, std::optional<int64_t> limit = std::nullopt) {
  return read_text_windows(kFolder / "text.txt", Tokenizer::load(kFolder), context, limit);
}

}  // namespace

TEST_CASE("the perplexity of a text equals transformers', however the text is cut into steps") {
  const auto expected = golden();
  Config config = golden_config(expected["model"], DType::fp32);
  config.memory.context = expected["context"];
  const TextWindows text = windows(config.memory.context);
  CHECK(text.tokens == expected["tokens"].get<int64_t>());
  LoadedModel model(config);
  const auto nll = [&](const TextWindows& of, ChunkLimits limits) {
    return score_text(model.session.decoder(), of, limits, kNoProgress);
  };
  CHECK(nll(text, {128, 16}) == doctest::Approx(expected["nll"].get<double>()).epsilon(1e-6));
  const TextWindows begin = windows(config.memory.context, 150);
  const double begin_nll = nll(begin, {128, 16});
  for (const ChunkLimits limits : {ChunkLimits{128, 1}, {33, 7}, {1, 1}}) {
    CAPTURE(limits.tokens);
    CHECK(nll(begin, limits) == doctest::Approx(begin_nll).epsilon(1e-6));
  }
}

TEST_CASE("perplexity stays within the planned workspace, to the byte, and pages like any run") {
  Config config = golden_config("llama4_text", DType::bf16);
  for (const int64_t chunk : {1, 16, 128}) {
    CAPTURE(chunk);
    config.memory.prefill_chunk = chunk;
    config.offload.resident = 0.3;
    config.memory.gpu_budget_bytes = uint64_t{2048} << 20;
    const PreparedModel plan = prepare(config);
    config.memory.gpu_budget_bytes = plan.plan.device_bytes;
    config.memory.host_budget_bytes = plan.plan.host_bytes;
    LoadedModel model(config);
    const int64_t rows = logit_rows(model.model, config);
    CHECK(rows >= 1);
    CHECK(rows <= chunk);
    const double nll = score_text(model.session.decoder(), windows(128, 300), {chunk, rows}, kNoProgress);
    CHECK(std::isfinite(nll));
    CHECK(model.session.device_peak_bytes() <= plan.plan.device_bytes);
    CHECK(model.session.counters().bytes_moved() > 0);
  }
}

TEST_CASE("logits are made in pieces where all of a chunk's would not fit") {
  Config config = golden_config("llama4_text", DType::fp32);
  const PreparedModel small = prepare(config);
  CHECK(logit_rows(small, config) == 16);
  PreparedModel wide = small;
  wide.spec.vocab = 200'000;
  CHECK(logit_rows(wide, config) < 16);
  CHECK(logit_rows(wide, config) >= 1);
}

TEST_CASE("windows fill the context, begin with the begin-of-text token, and score every token once") {
  const Tokenizer tokenizer = Tokenizer::load(kFolder);
  const TextWindows text = windows(100);
  std::vector<int64_t> scored;
  for (const TextWindow& window : text.windows) {
    CHECK(window.inputs.size() == window.targets.size());
    CHECK(window.inputs.front() == tokenizer.token_id("<|begin_of_text|>"));
    CHECK(std::equal(window.inputs.begin() + 1, window.inputs.end(), window.targets.begin()));
    CHECK((window.targets.size() == 99 || &window == &text.windows.back()));
    scored.insert(scored.end(), window.targets.begin(), window.targets.end());
  }
  std::ifstream in(kFolder / "text.txt");
  const std::string content(std::istreambuf_iterator<char>(in), {});
  CHECK(tokenizer.decode(scored, false) == content);
  CHECK(text.tokens == static_cast<int64_t>(scored.size()));
  CHECK(text.bytes == static_cast<int64_t>(content.size()));

  const TextWindows cut = windows(100, 150);
  CHECK(cut.tokens == 150);
  CHECK(cut.windows.size() == 2);
  CHECK(cut.bytes < text.bytes);
}

TEST_CASE("without a begin-of-text token the first token of a window is not scored") {
  std::ifstream in(kFolder / "tokenizer.json");
  auto json = nlohmann::json::parse(in);
  json["post_processor"] = nullptr;
  const Tokenizer tokenizer = Tokenizer::parse(json.dump(), "test");
  const TextWindows text = read_text_windows(kFolder / "text.txt", tokenizer, 100, 99 + 99 + 1);
  // The last window is one token, so there is nothing to score in it.
  REQUIRE(text.windows.size() == 2);
  CHECK(text.tokens == 98 + 98);
  CHECK(text.windows[0].inputs[1] == text.windows[0].targets[0]);
}

TEST_CASE("a text that cannot be scored is refused with what to do") {
  const Tokenizer tokenizer = Tokenizer::load(kFolder);
  CHECK_THROWS_AS(read_text_windows(kFolder / "nothing.txt", tokenizer, 100, {}), ConfigError);
  CHECK_THROWS_AS(read_text_windows(kFolder, tokenizer, 100, {}), ConfigError);
  CHECK_THROWS_AS(read_text_windows(kFolder / "text.txt", tokenizer, 1, {}), ConfigError);
  const YamlFile empty("");
  CHECK_THROWS_AS(read_text_windows(empty.file, tokenizer, 100, {}), ConfigError);

  LoadedModel model(golden_config("llama4_text", DType::fp32));
  TextWindows text = windows(100);
  text.windows[0].targets[3] = 160;
  CHECK_THROWS_AS(score_text(model.session.decoder(), text, {16, 1}, kNoProgress), ConfigError);
  text = windows(100);
  CHECK_THROWS_AS(score_text(model.session.decoder(), text, {16, 1}, [](auto&&...) { throw Interrupted(); }),
                  Interrupted);
}

TEST_CASE("a token's negative log likelihood is exact for large logits, and what is not finite is refused") {
  const std::vector<float> logits = {1000, 999, -1000};
  CHECK(negative_log_likelihood(logits, 0) == doctest::Approx(std::log1p(std::exp(-1.0))).epsilon(1e-12));
  CHECK(negative_log_likelihood(logits, 2) == doctest::Approx(2000.313261687518).epsilon(1e-12));
  CHECK_THROWS_AS(negative_log_likelihood(std::vector<float>{1, NAN, 2}, 0), DeviceError);
  CHECK_THROWS_AS(negative_log_likelihood(std::vector<float>{1, INFINITY}, 0), DeviceError);
}
