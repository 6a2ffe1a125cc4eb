// Conversions between fp32 and the two 16-bit formats that checkpoints hold. A 16-bit value is its
// bit pattern in a uint16_t. Pure functions; the array forms have no branches, so that a compiler
// turns them into vector code. src and dst must not overlap.
//
// fp16 and bf16 to fp32 is exact. fp32 to bf16 rounds to nearest, ties to even; beyond the largest
// finite value it rounds to infinity. A NaN stays a NaN of the same sign and becomes quiet.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace lighter {

inline float bf16_to_fp32(std::uint16_t value) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(value) << 16);
}

inline std::uint16_t fp32_to_bf16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  // The rounding carry would turn some NaNs into infinity or zero.
  const std::uint32_t nan = (bits >> 16) | 0x0040u;
  return static_cast<std::uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
}

// Both cases are computed and one is selected. Normal numbers: move exponent and mantissa into place,
// with an exponent that is too large by 112, and scale by 2^-112 (which also keeps infinity and NaN).
// Subnormals: put the mantissa behind the leading one of 0.5 and subtract 0.5. Neither makes an fp32
// subnormal, so flush-to-zero modes do not change the result.
inline float fp16_to_fp32(std::uint16_t value) {
  const std::uint32_t word = static_cast<std::uint32_t>(value) << 16;
  const std::uint32_t sign = word & 0x80000000u;
  const std::uint32_t magnitude = word + word;  // drops the sign
  const float normal = std::bit_cast<float>((magnitude >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = std::bit_cast<float>((magnitude >> 17) | (126u << 23)) - 0.5f;
  // Selected by a mask: a compiler may not turn a choice between two computed floats into vector code.
  const std::uint32_t is_subnormal = 0u - static_cast<std::uint32_t>(magnitude < (1u << 27));
  const std::uint32_t bits = (std::bit_cast<std::uint32_t>(subnormal) & is_subnormal) |
                             (std::bit_cast<std::uint32_t>(normal) & ~is_subnormal);
  return std::bit_cast<float>(sign | bits);
}

inline void bf16_to_fp32(const std::uint16_t* __restrict src, float* __restrict dst, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) dst[i] = bf16_to_fp32(src[i]);
}

inline void fp16_to_fp32(const std::uint16_t* __restrict src, float* __restrict dst, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) dst[i] = fp16_to_fp32(src[i]);
}

inline void fp32_to_bf16(const float* __restrict src, std::uint16_t* __restrict dst, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) dst[i] = fp32_to_bf16(src[i]);
}

inline void fp16_to_bf16(const std::uint16_t* __restrict src, std::uint16_t* __restrict dst,
                         std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) dst[i] = fp32_to_bf16(fp16_to_fp32(src[i]));
}

}  // namespace lighter
