#include "runtime/float_convert.h"

#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <vector>

namespace lighter {

TEST_CASE("every 16-bit pattern converts to the fp32 number that it stands for") {
  std::vector<std::uint16_t> patterns(65536);
  for (std::size_t i = 0; i < patterns.size(); ++i) patterns[i] = static_cast<std::uint16_t>(i);
  std::vector<float> from_fp16(65536);
  std::vector<float> from_bf16(65536);
  fp16_to_fp32(patterns.data(), from_fp16.data(), patterns.size());
  bf16_to_fp32(patterns.data(), from_bf16.data(), patterns.size());
  // The definition of a binary float: sign, exponent and mantissa, the slow way.
  const auto value_of = [](unsigned bits, int exponent_bits, int mantissa_bits) {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = static_cast<int>(bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
    const int mantissa = static_cast<int>(bits) & ((1 << mantissa_bits) - 1);
    const double sign = (bits & 0x8000u) != 0 ? -1.0 : 1.0;
    if (exponent == (1 << exponent_bits) - 1) return mantissa == 0 ? sign * INFINITY : double{NAN};
    if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
    return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  };
  int wrong = 0;
  const auto compare = [&](float got, double want) {
    wrong += std::isnan(want) ? !std::isnan(got)
                              : std::bit_cast<std::uint32_t>(got) !=
                                    std::bit_cast<std::uint32_t>(static_cast<float>(want));
  };
  for (unsigned i = 0; i < 65536; ++i) {
    compare(from_fp16[i], value_of(i, 5, 10));
    compare(from_bf16[i], value_of(i, 8, 7));
    wrong += std::signbit(from_fp16[i]) != (i >= 0x8000u);
  }
  CHECK(wrong == 0);
}

TEST_CASE("fp32 rounds to the nearest bf16, ties to even, and NaNs stay NaNs") {
  std::vector<float> values;
  for (std::uint32_t high = 0; high < 65536; ++high) {
    for (const std::uint32_t low : {0x0000u, 0x0001u, 0x7FFFu, 0x8000u, 0x8001u, 0xFFFFu}) {
      values.push_back(std::bit_cast<float>(high << 16 | low));
    }
  }
  std::vector<std::uint16_t> rounded(values.size());
  fp32_to_bf16(values.data(), rounded.data(), values.size());
  int wrong = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const auto down = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(values[i]) >> 16);
    const float got = bf16_to_fp32(rounded[i]);
    wrong += std::signbit(got) != std::signbit(values[i]);
    if (std::isnan(values[i])) {
      wrong += !std::isnan(got);
      continue;
    }
    if (std::isinf(values[i])) {
      wrong += got != values[i];
      continue;
    }
    // Neighbours as doubles; the one above the largest finite number is 2^128, written as infinity.
    const double below = bf16_to_fp32(down);
    const auto up = static_cast<std::uint16_t>(down + 1);
    const double above = std::isinf(bf16_to_fp32(up)) ? std::copysign(0x1.0p128, below) : bf16_to_fp32(up);
    const double to_below = std::abs(values[i] - below);
    const double to_above = std::abs(above - values[i]);
    const bool take_up = to_above < to_below || (to_above == to_below && (down & 1) != 0);
    wrong += rounded[i] != (take_up ? up : down);
  }
  CHECK(wrong == 0);
}

TEST_CASE("fp16 becomes bf16 with one rounding") {
  std::vector<std::uint16_t> patterns(65536);
  for (std::size_t i = 0; i < patterns.size(); ++i) patterns[i] = static_cast<std::uint16_t>(i);
  std::vector<std::uint16_t> narrow(65536);
  fp16_to_bf16(patterns.data(), narrow.data(), patterns.size());
  int wrong = 0;
  for (std::size_t i = 0; i < patterns.size(); ++i)
    wrong += narrow[i] != fp32_to_bf16(fp16_to_fp32(patterns[i]));
  CHECK(wrong == 0);
}

}  // namespace lighter
