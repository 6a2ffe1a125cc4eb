// The shipped trained model, from its folder to its text.
#include <doctest/doctest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "runtime/cli/model_text.h"
#include "runtime/engine/generator.h"
#include "tests/models/test_model.h"

using namespace lighter;
using namespace lighter::test;

TEST_CASE(
    "the shipped model writes the text that transformers writes, with two thirds of its experts paged") {
  std::ifstream in(kGoldens / "tiny_greedy.json");
  const auto cases = nlohmann::json::parse(in);
  Config config = golden_config("", DType::fp32);
  config.model.path = std::filesystem::path(LIGHTER_SOURCE_DIR) / "models/tiny";
  config.memory.context = 512;
  config.offload.slice_width = 64;
  config.offload.resident = 0.33;
  config.offload.prefetch = {true, 1};
  const cli::ModelText text = cli::load_text(config.model);
  LoadedModel model(config);
  const std::atomic<bool> never{false};
  Generator generator(model.session.decoder(), text.tokenizer_or_null(), never);
  REQUIRE(cases.size() > 0);
  for (const auto& expected : cases) {
    CAPTURE(expected["prompt"].get<std::string>());
    GenerateRequest request;
    request.prompt = text.tokenizer_or_null()->encode(expected["prompt"].get<std::string>(), true);
    CHECK(request.prompt == expected["prompt_ids"].get<std::vector<int64_t>>());
    request.max_tokens = 60;
    std::string streamed;
    const auto result = generator.generate(request, [&](const std::string& shown) { streamed += shown; });
    CHECK(result.ids == expected["ids"].get<std::vector<int64_t>>());
    CHECK(streamed == expected["text"].get<std::string>());
  }
}

TEST_CASE(
    "generation stops at stop strings and stop tokens, at the token limit and at the end of the context") {
  Config config = golden_config("", DType::fp32);
  config.model.path = std::filesystem::path(LIGHTER_SOURCE_DIR) / "models/tiny";
  config.memory.context = 64;
  config.offload.slice_width = 64;
  const cli::ModelText text = cli::load_text(config.model);
  LoadedModel model(config);
  const std::atomic<bool> never{false};
  Generator generator(model.session.decoder(), text.tokenizer_or_null(), never);
  GenerateRequest request;
  request.prompt = text.tokenizer_or_null()->encode("It was a dark and stormy night", true);
  std::string streamed;
  const auto collect = [&](const std::string& shown) { streamed += shown; };

  request.max_tokens = 30;
  const auto whole = generator.generate(request, collect);
  CHECK(whole.finish == FinishReason::length);
  CHECK(whole.ids.size() == 30);

  request.stop = {whole.text.substr(10, 5)};
  streamed.clear();
  const auto stopped = generator.generate(request, collect);
  CHECK(stopped.finish == FinishReason::stop_string);
  CHECK(streamed == whole.text.substr(0, whole.text.find(request.stop[0])));

  request.stop.clear();
  request.stop_tokens = {whole.ids[7]};
  const auto ended = generator.generate(request, collect);
  CHECK(ended.finish == FinishReason::stop_token);
  CHECK(ended.ids.back() == whole.ids[7]);

  request.stop_tokens.clear();
  request.max_tokens = 1000;
  const auto full = generator.generate(request, collect);
  CHECK(full.finish == FinishReason::context_full);
  CHECK(full.prompt_tokens + static_cast<int64_t>(full.ids.size()) == 64 + 1);

  const std::atomic<bool> at_once{true};
  Generator interrupted(model.session.decoder(), text.tokenizer_or_null(), at_once);
  CHECK_THROWS_AS(interrupted.generate(request, collect), std::exception);
}

TEST_CASE("with quantized experts, paged output equals resident output bit for bit and stays near bf16's") {
  Config config = golden_config("", DType::bf16);
  config.model.path = std::filesystem::path(LIGHTER_SOURCE_DIR) / "models/tiny";
  config.offload.slice_width = 0;
  const cli::ModelText text = cli::load_text(config.model);
  const auto ids = text.tokenizer->encode(
      "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in "
      "want of "
      "a wife. And the king said unto him, Go, and tell the people what thou hast seen.",
      true);
  const auto logits = [&](SliceEncoding experts, double resident, OffloadConfig::Policy policy) {
    config.model.experts = experts;
    config.offload.resident = resident;
    config.offload.policy = policy;
    config.offload.miss = OffloadConfig::Miss::fetch;
    LoadedModel model(config);
    return model.mixed_logits(ids, 30, 20);
  };
  using Policy = OffloadConfig::Policy;
  const auto reference = logits(SliceEncoding::dense, 1.0, Policy::static_);
  for (const SliceEncoding encoding : {SliceEncoding::int8, SliceEncoding::int4}) {
    CAPTURE(encoding_name(encoding));
    const auto resident = logits(encoding, 1.0, Policy::static_);
    CHECK(logits(encoding, 0.33, Policy::lfu) == resident);
    CHECK(logits(encoding, 0.0, Policy::lru) == resident);
    CHECK(relative_error(resident, reference) < (encoding == SliceEncoding::int8 ? 0.02 : 0.1));
    CHECK(resident != reference);
  }
}

TEST_CASE("of a short prompt the CPU computes a part of what is missed, which changes it by rounding alone") {
  Config config = golden_config("", DType::bf16);
  config.model.path = std::filesystem::path(LIGHTER_SOURCE_DIR) / "models/tiny";
  config.model.experts = SliceEncoding::int8;
  config.offload.slice_width = 0;
  config.offload.resident = 0.33;
  config.offload.policy = OffloadConfig::Policy::static_;
  config.decode = DecodeMode::eager;
  const cli::ModelText text = cli::load_text(config.model);
  const auto ids = text.tokenizer->encode("It is a truth universally acknowledged, that a single man", true);
  const auto prompt = [&](OffloadConfig::Miss miss, uint64_t& cpu_bytes) {
    config.offload.miss = miss;
    LoadedModel model(config);
    auto logits = model.logits(ids, static_cast<int64_t>(ids.size()));
    cpu_bytes = model.session.counters().cpu_bytes;
    return logits;
  };
  using Miss = OffloadConfig::Miss;
  uint64_t fetched = 0, computed = 0;
  const auto expected = prompt(Miss::fetch, fetched);
  CHECK(fetched == 0);
  for (const Miss miss : {Miss::cpu, Miss::split}) {
    CAPTURE(miss_name(miss));
    auto logits = prompt(miss, computed);
    auto others = expected;
    // How much the CPU computes depends on time, and one token's router is so near a tie that its rounding
    // may choose another expert: the token that differs most is left out.
    const auto vocabulary = static_cast<std::ptrdiff_t>(logits.size() / ids.size());
    const auto error_of = [&](std::ptrdiff_t first) {
      const auto token = [&](const auto& all) {
        return std::vector<float>(all.begin() + first, all.begin() + first + vocabulary);
      };
      return relative_error(token(logits), token(expected));
    };
    std::ptrdiff_t worst = 0;
    for (std::ptrdiff_t first = 0; first < std::ssize(logits); first += vocabulary) {
      if (error_of(first) > error_of(worst)) worst = first;
    }
    for (auto* const all : {&logits, &others}) {
      all->erase(all->begin() + worst, all->begin() + worst + vocabulary);
    }
    CHECK(relative_error(logits, others) < 0.02);
    CHECK(computed > 0);
  }
}
