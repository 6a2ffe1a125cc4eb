// Packed slices of random weights, for the tests of formats and kernels.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "runtime/quant/packed_slice.h"
#include "runtime/quant/quantize.h"

namespace lighter {

inline constexpr SliceEncoding kEncodings[] = {SliceEncoding::int8, SliceEncoding::int4};
inline constexpr SliceMatrix kMatrices[] = {SliceMatrix::gate, SliceMatrix::up, SliceMatrix::down};

inline std::vector<float> normal(size_t count, float deviation, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> distribution(0, deviation);
  std::vector<float> values(count);
  for (float& value : values) value = distribution(random);
  return values;
}

// Memory that a slice may lie in: what a test does not write stays 0xEE.
inline std::vector<std::byte> slice_memory(SliceEncoding encoding, int64_t hidden, int64_t width) {
  return std::vector<std::byte>(packed_slice_bytes(encoding, hidden, width), std::byte{0xEE});
}

struct RandomSlice {
  RandomSlice(SliceEncoding encoding, int64_t hidden, int64_t width, unsigned seed)
      : layout(packed_slice_layout(encoding, hidden, width)), bytes(slice_memory(encoding, hidden, width)) {
    const auto size = static_cast<size_t>(hidden * width);
    const float into = 1 / std::sqrt(static_cast<float>(hidden));
    const float out_of = 1 / std::sqrt(static_cast<float>(width));
    matrices[0] = normal(size, into, seed);
    matrices[1] = normal(size, into, seed + 1);
    matrices[2] = normal(size, out_of, seed + 2);
    pack_slice(encoding, hidden, width, matrices[0].data(), matrices[1].data(), matrices[2].data(),
               bytes.data());
  }
  PackedSliceLayout layout;
  std::vector<std::byte> bytes;
  std::vector<float> matrices[3];
};

inline std::vector<double> doubles(const std::vector<float>& values) {
  return {values.begin(), values.end()};
}

}  // namespace lighter
