#include "offload/bound.h"

#include <doctest/doctest.h>

#include <cmath>
#include <random>

namespace lighter::offload {
namespace {

constexpr double kGb = 1e9;

// Scout with int8 experts in groups of 128 (8.25 bits a weight), dense weights too, as LIMITS states them.
StepBytes scout() {
  const double bits = 8.25 / 8;
  const double attention = 48.0 * 5120 * 128 * (2 * 40 + 2 * 8), head = 202048.0 * 5120;
  const double shared = 48.0 * 3 * 5120 * 8192, expert = 3.0 * 5120 * 8192;
  StepBytes bytes;
  bytes.fixed = static_cast<uint64_t>((attention + head + shared) * bits);
  bytes.shared = static_cast<uint64_t>(shared * bits);
  bytes.expert = static_cast<uint64_t>(expert * bits);
  bytes.moe_layers = 48;
  bytes.experts = 16;
  bytes.experts_per_token = 1;
  return bytes;
}

const Rates kH100{3090, 55.2, 142, 159};

double tokens_per_s(double resident, MissWay way) {
  return 1 / *step_bound_s(scout(), resident, way, kH100, 1, 0);
}

TEST_CASE("the bound is the published one for Scout in int8 on an H100") {
  CHECK(tokens_per_s(0.67, MissWay::both) == doctest::Approx(70).epsilon(0.02));
  CHECK(tokens_per_s(0, MissWay::both) == doctest::Approx(24.7).epsilon(0.02));
}

TEST_CASE("all resident, both parts of the step are read by the device and nothing else") {
  std::mt19937_64 engine(std::random_device{}());
  for (int i = 0; i < 100; ++i) {
    StepBytes bytes;
    bytes.shared = engine() % 1'000'000'000;
    bytes.fixed = bytes.shared + engine() % 1'000'000'000;
    bytes.expert = engine() % 1'000'000'000;
    bytes.moe_layers = 1 + static_cast<int>(engine() % 100);
    bytes.experts = 8;
    bytes.experts_per_token = 2;
    const Rates only_device{100.0, {}, {}, {}};
    const double all =
        static_cast<double>(bytes.fixed) + 2.0 * bytes.moe_layers * static_cast<double>(bytes.expert);
    CHECK(*step_bound_s(bytes, 1, MissWay::link, only_device, 1, 0) == doctest::Approx(all / (100 * kGb)));
    CHECK_FALSE(step_bound_s(bytes, 0.5, MissWay::link, only_device, 1, 0));
  }
}

TEST_CASE("more resident, more ways and smaller batches never make a step slower") {
  for (double share = 0; share < 0.89; share += 0.1) {
    CHECK(tokens_per_s(share + 0.1, MissWay::link) >= tokens_per_s(share, MissWay::link));
    CHECK(tokens_per_s(share, MissWay::both) >= tokens_per_s(share, MissWay::link));
    CHECK(*step_bound_s(scout(), share, MissWay::both, kH100, 4, 0) >=
          *step_bound_s(scout(), share, MissWay::both, kH100, 1, 0));
  }
}

TEST_CASE("a large batch needs every expert, one token needs its own") {
  CHECK(distinct_experts(16, 1, 1) == doctest::Approx(1));
  CHECK(distinct_experts(8, 2, 1) == doctest::Approx(2));
  CHECK(distinct_experts(16, 1, 2) == doctest::Approx(1 + 15.0 / 16));
  CHECK(distinct_experts(16, 1, 10000) == doctest::Approx(16));
  CHECK(distinct_experts(0, 0, 4) == 0);
}

TEST_CASE("keys and values are read by the device, for each sequence") {
  StepBytes bytes = scout();
  bytes.kv_per_token = 1'000'000;
  const double with = *step_bound_s(bytes, 1, MissWay::both, kH100, 2, 1000);
  const double without = *step_bound_s(bytes, 1, MissWay::both, kH100, 2, 0);
  CHECK(with - without == doctest::Approx(2e9 / (3090 * kGb)));
}

}  // namespace
}  // namespace lighter::offload
