// fp32 to fp16 bit patterns, for scales and minima. Pure functions. The way back is runtime/float_convert.h.
#pragma once

#include <bit>
#include <cstdint>

#include "runtime/float_convert.h"

namespace lighter {

inline constexpr float kLargestHalf = 65504.0f;

// Rounds to nearest, ties to even; subnormals included. Needs |value| < 65520, beyond which fp16 has no
// number.
inline std::uint16_t fp32_to_fp16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Below 2^-14 fp16 is a fixed-point number of 2^-24: adding 0.5, whose last bit is 2^-24, rounds to it.
  const float fixed = std::bit_cast<float>(magnitude) + 0.5f;
  const std::uint32_t subnormal = std::bit_cast<std::uint32_t>(fixed) - 0x3F000000u;
  const std::uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  return static_cast<std::uint16_t>(sign | (magnitude < 0x38800000u ? subnormal : normal));
}

// The least fp16 number >= value, and the greatest <= value. Need |value| <= kLargestHalf.
inline std::uint16_t fp16_at_least(float value) {
  const std::uint16_t nearest = fp32_to_fp16(value);
  if (fp16_to_fp32(nearest) >= value) return nearest;
  if (nearest == 0x8000u) return 1;  // minus zero is followed by the least positive number
  return static_cast<std::uint16_t>(nearest & 0x8000u ? nearest - 1 : nearest + 1);
}

inline std::uint16_t fp16_at_most(float value) {
  return static_cast<std::uint16_t>(fp16_at_least(-value) ^ 0x8000u);
}

}  // namespace lighter
