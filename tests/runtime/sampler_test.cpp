#include "runtime/engine/sampler.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>

#include "runtime/error.h"

namespace lighter {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Probabilities by the definitions, one after the other, each renormalised: temperature, top-k, top-p, min-p.
std::vector<double> reference(const std::vector<float>& logits, const SamplingOptions& options) {
  std::vector<double> p;
  for (const float logit : logits) p.push_back(std::exp(logit / options.temperature));
  const auto normalise = [&] {
    const double sum = std::accumulate(p.begin(), p.end(), 0.0);
    for (double& value : p) value /= sum;
  };
  const auto order = [&] {
    std::vector<size_t> ids(p.size());
    std::iota(ids.begin(), ids.end(), 0);
    std::stable_sort(ids.begin(), ids.end(), [&](size_t a, size_t b) { return p[a] > p[b]; });
    return ids;
  };
  normalise();
  if (options.top_k) {
    const auto ids = order();
    for (size_t i = *options.top_k; i < ids.size(); ++i) p[ids[i]] = 0;
    normalise();
  }
  if (options.top_p) {
    double before = 0;
    for (const size_t id : order()) {
      const double own = p[id];
      if (before > 0 && before >= *options.top_p) p[id] = 0;
      before += own;
    }
    normalise();
  }
  if (options.min_p) {
    const double limit = *options.min_p * *std::max_element(p.begin(), p.end());
    for (double& value : p) value = value < limit ? 0 : value;
    normalise();
  }
  return p;
}

std::vector<float> random_logits(int vocab, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> logits(vocab);
  for (float& logit : logits) logit = normal(random);
  return logits;
}

}  // namespace

TEST_CASE("temperature 0 takes the likeliest, and of equals the lowest id") {
  Sampler sampler({});
  CHECK(sampler.sample(std::vector<float>{1, 3, 2}) == 1);
  CHECK(sampler.sample(std::vector<float>{3, 1, 3, 3}) == 0);
  CHECK(sampler.sample(std::vector<float>{-kInfinity, -5, -kInfinity}) == 1);
  CHECK(sampler.sample(std::vector<float>{-1e30f, -1e31f}) == 0);
}

TEST_CASE("logits that are no numbers, or leave no choice, are a DeviceError") {
  for (const double temperature : {0.0, 0.7}) {
    SamplingOptions options;
    options.temperature = temperature;
    Sampler sampler(options);
    CHECK_THROWS_WITH_AS(sampler.sample(std::vector<float>{1, kNan, 2}), doctest::Contains("NaN for token 1"),
                         DeviceError);
    CHECK_THROWS_AS(sampler.sample(std::vector<float>{-kInfinity, -kInfinity}), DeviceError);
    CHECK_THROWS_WITH_AS(sampler.sample(std::vector<float>{1, 2, kInfinity}), doctest::Contains("token 2"),
                         DeviceError);
  }
  CHECK_THROWS_AS(top_logprobs(std::vector<float>{1, kNan}, 1), DeviceError);
}

TEST_CASE("samples follow the distribution that the definitions give") {
  struct Case {
    double temperature;
    std::optional<int> top_k;
    std::optional<double> top_p;
    std::optional<double> min_p;
  };
  const std::vector<Case> cases = {{1, {}, {}, {}},   {0.5, {}, {}, {}}, {2, 5, {}, {}},
                                   {1, {}, 0.8, {}},  {1, {}, {}, 0.1},  {0.8, 10, 0.9, 0.05},
                                   {1.5, 3, 0.5, {}}, {1, 1, {}, {}},    {1, 1000, 1.0, 0.0},
                                   {1, {}, 1e-9, {}}, {1, {}, {}, 1.0},  {1, 7, {}, 0.3}};
  constexpr int kDraws = 20'000;
  for (size_t i = 0; i < cases.size(); ++i) {
    SamplingOptions options{cases[i].temperature, cases[i].top_k, cases[i].top_p, cases[i].min_p, 42 + i};
    const auto logits = random_logits(20, i);
    const auto expected = reference(logits, options);
    Sampler sampler(options);
    std::vector<int> drawn(logits.size());
    for (int draw = 0; draw < kDraws; ++draw) ++drawn[sampler.sample(logits)];
    CAPTURE(i);
    for (size_t id = 0; id < logits.size(); ++id) {
      CAPTURE(id);
      const double deviation = std::sqrt(expected[id] * (1 - expected[id]) / kDraws);
      if (expected[id] == 0) CHECK(drawn[id] == 0);
      CHECK(std::abs(static_cast<double>(drawn[id]) / kDraws - expected[id]) <= 5 * deviation);
    }
  }
}

TEST_CASE("of equally likely tokens top-k keeps the lower ids") {
  Sampler sampler({1.0, 2, {}, {}, 1});
  for (int draw = 0; draw < 200; ++draw) CHECK(sampler.sample(std::vector<float>{1, 1, 1, 1}) < 2);
}

TEST_CASE("a token of -inf is never drawn") {
  Sampler sampler({5.0, {}, {}, {}, 3});
  const std::vector<float> logits = {-kInfinity, 0, -kInfinity, 0.5, -kInfinity};
  for (int draw = 0; draw < 5000; ++draw) {
    const int64_t id = sampler.sample(logits);
    CHECK((id == 1 || id == 3));
  }
}

TEST_CASE("very small and very large temperatures stay within the numbers") {
  const auto logits = random_logits(50, 7);
  Sampler cold({1e-6, {}, {}, {}, 1});
  Sampler greedy({});
  for (int draw = 0; draw < 50; ++draw) CHECK(cold.sample(logits) == greedy.sample(logits));
  Sampler hot({1e6, {}, {}, {}, 1});
  std::map<int64_t, int> seen;
  for (int draw = 0; draw < 5000; ++draw) ++seen[hot.sample(logits)];
  CHECK(seen.size() == 50);
}

TEST_CASE("the same seed gives the same tokens, another seed others, no seed others each time") {
  const auto logits = random_logits(100, 1);
  const auto draw = [&](std::optional<uint64_t> seed) {
    Sampler sampler({1.0, {}, {}, {}, seed});
    std::vector<int64_t> ids;
    for (int i = 0; i < 40; ++i) ids.push_back(sampler.sample(logits));
    return ids;
  };
  CHECK(draw(5) == draw(5));
  CHECK(draw(5) != draw(6));
  CHECK(draw({}) != draw({}));
}

TEST_CASE("logprobs are of the unscaled distribution, likeliest first, ties by id") {
  const auto logits = random_logits(64, 3);
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit));
  const auto top = top_logprobs(logits, 10);
  REQUIRE(top.size() == 10);
  for (size_t i = 0; i < top.size(); ++i) {
    CHECK(top[i].logprob == doctest::Approx(logits[top[i].id] - std::log(sum)).epsilon(1e-12));
    if (i > 0) CHECK(top[i].logprob <= top[i - 1].logprob);
  }
  const float tenth = logits[top.back().id];
  CHECK(std::count_if(logits.begin(), logits.end(), [&](float logit) { return logit > tenth; }) == 9);
  const auto ties = top_logprobs(std::vector<float>{2, 5, 5, 2}, 9);
  REQUIRE(ties.size() == 4);
  CHECK(ties[0].id == 1);
  CHECK(ties[1].id == 2);
  CHECK(ties[2].id == 0);
  CHECK(ties[3].id == 3);
  CHECK(top_logprobs(logits, 0).empty());
}

TEST_CASE("large logits do not overflow") {
  const auto top = top_logprobs(std::vector<float>{3e38f, 3e38f, -3e38f}, 3);
  CHECK(top[0].logprob == doctest::Approx(-std::log(2.0)));
  Sampler sampler({1.0, {}, {}, {}, 1});
  CHECK(sampler.sample(std::vector<float>{3e38f, -3e38f}) == 0);
}

}  // namespace lighter
