// One group of GPTQ, against its definition in double precision.
#include "runtime/quant/gptq.h"

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "runtime/float_convert.h"
#include "runtime/quant/quantize.h"

using namespace lighter;

namespace {

constexpr int kSize = 64;

struct Rounded {
  std::array<uint8_t, 32> q{};
  uint16_t scale = 0, minimum = 0;
  std::array<float, kSize> errors{};
  bool whole = false;

  double value(int j) const {
    const int level = j < 32 ? q[j] & 15 : q[j - 32] >> 4;
    return fp16_to_fp32(scale) * static_cast<double>(level) + fp16_to_fp32(minimum);
  }
};

Rounded round_group(const std::vector<float>& values, const std::vector<float>& factor) {
  std::array<float, kSize> importance{};
  double sum = 0;
  for (int j = 0; j < kSize; ++j) sum += 1 / std::pow(factor[j * kSize + j], 2.0);
  for (int j = 0; j < kSize; ++j) {
    importance[j] = static_cast<float>(kSize / std::pow(factor[j * kSize + j], 2.0) / sum);
  }
  Rounded rounded;
  rounded.whole = gptq_int4(values.data(), {factor.data(), importance.data()}, rounded.q.data(),
                            &rounded.scale, &rounded.minimum, rounded.errors.data());
  return rounded;
}

std::vector<float> normal_values(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 0.02f);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// U of inputs whose neighbours go together: x[j] = 0.9 x[j - 1] + noise has inverse(H) tridiagonal. Any upper
// triangular matrix will do.
std::vector<float> some_factor(unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-0.5f, 0.5f);
  std::vector<float> factor(kSize * kSize, 0.0f);
  for (int j = 0; j < kSize; ++j) {
    factor[j * kSize + j] = 1.0f + uniform(random);
    for (int k = j + 1; k < std::min(kSize, j + 6); ++k) factor[j * kSize + k] = uniform(random);
  }
  return factor;
}

}  // namespace

TEST_CASE("where inputs do not go together, GPTQ rounds as the search for the least error does") {
  std::vector<float> factor(kSize * kSize, 0.0f);
  for (int j = 0; j < kSize; ++j) factor[j * (kSize + 1)] = 3.0f;
  for (unsigned seed = 1; seed <= 20; ++seed) {
    const auto values = normal_values(kSize, seed);
    const Rounded rounded = round_group(values, factor);
    std::array<uint8_t, 32> q{};
    uint16_t scale = 0, minimum = 0;
    REQUIRE(quantize_int4(values.data(), 1, q.data(), &scale, &minimum) == -1);
    CHECK(rounded.whole);
    CHECK(rounded.scale == scale);
    CHECK(rounded.minimum == minimum);
    CHECK(rounded.q == q);
  }
}

TEST_CASE(
    "each column is the nearest level to what the columns before it left, and its error is told to those "
    "behind") {
  for (unsigned seed = 1; seed <= 20; ++seed) {
    CAPTURE(seed);
    const auto values = normal_values(kSize, seed);
    const auto factor = some_factor(seed + 100);
    const Rounded rounded = round_group(values, factor);
    REQUIRE(rounded.whole);
    const double step = fp16_to_fp32(rounded.scale);
    for (int j = 0; j < kSize; ++j) {
      double left = values[j];
      for (int i = 0; i < j; ++i) left -= static_cast<double>(rounded.errors[i]) * factor[i * kSize + j];
      const double off = left - rounded.value(j);
      CHECK(std::abs(off - static_cast<double>(rounded.errors[j]) * factor[j * kSize + j]) < 1e-6);
      const double level = (rounded.value(j) - fp16_to_fp32(rounded.minimum)) / step;
      const bool clipped = level < 0.5 ? off < 0 : level > 14.5 && off > 0;
      CHECK((clipped || std::abs(off) <= step * 0.5001 + 1e-7));
    }
  }
}

TEST_CASE("a group that cannot be stored is reported") {
  std::vector<float> factor(kSize * kSize, 0.0f);
  for (int j = 0; j < kSize; ++j) factor[j * (kSize + 1)] = 1.0f;
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 70000.0f}) {
    auto values = normal_values(kSize, 1);
    values[40] = bad;
    CHECK_FALSE(round_group(values, factor).whole);
  }
}
