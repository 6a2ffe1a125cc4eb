// The arithmetic of cpu_kernels.h, spelled out: for processors without AVX2, and as what the others are
// tested against.
#include <algorithm>
#include <cmath>

#include "runtime/float_convert.h"
#include "runtime/quant/cpu_kernels.h"

namespace lighter::cpu_kernels {
namespace {

float reduce(float (&lanes)[kLanes]) {
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

float row_int8(const Matrix& matrix, const QuantizedActivations& x, int64_t row, int64_t token) {
  float lanes[kLanes] = {};
  for (int64_t g = 0; g < x.groups(); ++g) {
    const auto* w = reinterpret_cast<const int8_t*>(matrix.values) + row * matrix.row_bytes + g * 128;
    const int8_t* a = x.values(token) + g * 128;
    const float scale = fp16_to_fp32(matrix.scales[row * matrix.row_groups + g]) * x.scales(token)[g];
    for (int64_t l = 0; l < kLanes; ++l) {
      int32_t dot = 0;
      for (int64_t i = 4 * l; i < 4 * l + 4; ++i) dot += w[i] * a[i] + w[i + 64] * a[i + 64];
      lanes[l] = std::fma(scale, static_cast<float>(dot), lanes[l]);
    }
  }
  return reduce(lanes);
}

float row_int4(const Matrix& matrix, const QuantizedActivations& x, int64_t row, int64_t token) {
  const uint16_t* scales = matrix.scales + row * matrix.row_groups;
  const uint16_t* minimums = matrix.minimums + row * matrix.row_groups;
  float lanes[kLanes] = {};
  float least[kLanes] = {};
  for (int64_t g = 0; g < x.groups(); g += 2) {
    const uint8_t* w = matrix.values + row * matrix.row_bytes + g * 32;
    const int8_t* a = x.values(token) + g * 64;
    for (int64_t l = 0; l < kLanes; ++l) {
      int32_t dot = 0;
      for (int64_t i = 4 * l; i < 4 * l + 4; ++i) dot += (w[i] & 15) * a[i] + (w[i] >> 4) * a[i + 64];
      const int64_t group = g + l / 8;
      if (group == x.groups()) continue;  // an odd last group has no partner
      const float scale = fp16_to_fp32(scales[group]) * x.scales(token)[group];
      lanes[l] = std::fma(scale, static_cast<float>(dot), lanes[l]);
    }
  }
  for (int64_t g = 0; g < x.padded_groups(); ++g) {
    const float minimum = g < x.groups() ? fp16_to_fp32(minimums[g]) : 0.0f;
    least[g % kLanes] = std::fma(minimum, x.scaled_sums(token)[g], least[g % kLanes]);
  }
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] += least[l];
  return reduce(lanes);
}

template <auto row_kernel>
void rows(const Matrix& matrix, const Tokens& x, int64_t first_row, int64_t count, float* result,
          int64_t stride, PrefetchStream&) {
  for (int64_t row = 0; row < count; ++row) {
    for (int64_t token = 0; token < x.count; ++token) {
      result[token * stride + row] = row_kernel(matrix, x.rows, first_row + row, x[token]);
    }
  }
}

}  // namespace

Kernels scalar_kernels() {
  return {rows<row_int8>, rows<row_int4>};
}

}  // namespace lighter::cpu_kernels
