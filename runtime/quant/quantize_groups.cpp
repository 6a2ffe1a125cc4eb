// The arithmetic of quantization. One body serves baseline x86-64 (or any other processor) and AVX2: GCC's
// vector types of 8 floats become whatever the target has. AVX2 is used without FMA, so that both round
// alike.
#include <algorithm>
#include <bit>
#include <cstring>

#include "runtime/float_convert.h"
#include "runtime/quant/gptq.h"
#include "runtime/quant/half.h"
#include "runtime/quant/quantize.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // vector types are passed only to functions that are always inlined

namespace lighter {
namespace {

using Floats = float __attribute__((vector_size(32)));
using Ints = int32_t __attribute__((vector_size(32)));
using Bytes = int8_t __attribute__((vector_size(8)));

#define LIGHTER_INLINE inline __attribute__((always_inline))

LIGHTER_INLINE Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

LIGHTER_INLINE Floats least(const Floats& a, const Floats& b) {
  return a < b ? a : b;
}

// For |value| < 2^22, value + kRounder has in its mantissa value rounded to the nearest integer, ties to
// even.
constexpr float kRounder = 12582912.0f;
constexpr int32_t kRounderBits = std::bit_cast<int32_t>(kRounder);
LIGHTER_INLINE Ints round_to_ints(const Floats& value) {
  return reinterpret_cast<Ints>(value + kRounder) - kRounderBits;
}

LIGHTER_INLINE float sum(const Floats& of) {
  Floats v = of;
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
  return v[0] + v[1];
}
LIGHTER_INLINE float least(const Floats& of) {
  Floats v = of;
  v = least(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
  v = least(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
  return std::min(v[0], v[1]);
}

// max|value| of a group, as the bits of a float: NaN and infinity come out above every number.
template <int count>
LIGHTER_INLINE int32_t magnitude_bits(const float* values) {
  Ints most = {};
  for (int i = 0; i < count; i += 8) {
    const Ints bits = reinterpret_cast<Ints>(load(values + i)) & 0x7FFFFFFF;
    most = bits > most ? bits : most;
  }
  int32_t result = 0;
  for (int i = 0; i < 8; ++i) result = std::max(result, most[i]);
  return result;
}
constexpr int32_t kLargestBits = std::bit_cast<int32_t>(kLargestHalf);

LIGHTER_INLINE int64_t int8_groups(const float* values, int64_t groups, int8_t* q, uint16_t* scales) {
  constexpr int size = 128;
  for (int64_t g = 0; g < groups; ++g, values += size, q += size) {
    const int32_t bits = magnitude_bits<size>(values);
    if (bits > kLargestBits) return g;
    scales[g] = fp16_at_least(std::bit_cast<float>(bits) / 127.0f);
    const float inverse = scales[g] == 0 ? 0.0f : 1.0f / fp16_to_fp32(scales[g]);
    for (int i = 0; i < size; i += 8) {
      const Bytes narrow = __builtin_convertvector(round_to_ints(load(values + i) * inverse), Bytes);
      std::memcpy(q + i, &narrow, sizeof narrow);
    }
  }
  return -1;
}

constexpr int kSize = 64;
constexpr float kTop = 15.0f;

// How q describes a group y, before the line y ≈ step * q + base is known.
struct Fit {
  float q = 0, qq = 0, qy = 0;  // sums of q, q², q·y
};

// The integers in [0, 15] nearest to y * inverse - offset. Clamped as bits, which order like the numbers from
// kRounder on, because compilers turn integer minima into one instruction and those of floats into three.
LIGHTER_INLINE Floats levels(const Floats& y, float inverse, float offset) {
  const Ints least_bits = Ints{} + kRounderBits;
  const Ints most_bits = least_bits + 15;
  Ints bits = reinterpret_cast<Ints>(y * inverse - offset + kRounder);
  bits = bits > least_bits ? bits : least_bits;
  bits = bits < most_bits ? bits : most_bits;
  return reinterpret_cast<Floats>(bits) - kRounder;
}

// What a group's values' squared errors count. Sums to kSize.
struct Even {
  LIGHTER_INLINE Floats times(int, const Floats& of) const { return of; }
};
struct Weighted {
  const float* weights;
  LIGHTER_INLINE Floats times(int i, const Floats& of) const { return load(weights + 8 * i) * of; }
};

template <typename Weights>
LIGHTER_INLINE Fit fit(const Floats (&y)[8], float step, float base, const Weights& weights) {
  const float inverse = 1.0f / step;
  const float offset = base * inverse;
  Floats q = {}, qq = {}, qy = {};
  for (int i = 0; i < 8; ++i) {
    const Floats level = levels(y[i], inverse, offset);
    const Floats counted = weights.times(i, level);
    q += counted;
    qq += counted * level;
    qy += counted * y[i];
  }
  return {sum(q), sum(qq), sum(qy)};
}

// A scale and minimum as stored, and the squared error they leave.
struct Stored {
  uint16_t scale = 0, minimum = 0;
  float error = 0;
};

LIGHTER_INLINE Floats stored_levels(const Floats& value, const Stored& stored) {
  const float inverse = stored.scale == 0 ? 0.0f : 1.0f / fp16_to_fp32(stored.scale);
  return levels(value - fp16_to_fp32(stored.minimum), inverse, 0);
}

template <typename Weights>
LIGHTER_INLINE Stored store(const float* values, uint16_t scale, uint16_t minimum, const Weights& weights) {
  Stored stored{scale, minimum, 0};
  Floats error = {};
  for (int i = 0; i < 8; ++i) {
    const Floats value = load(values + 8 * i);
    const Floats off = value - fp16_to_fp32(minimum) - stored_levels(value, stored) * fp16_to_fp32(scale);
    error += weights.times(i, off * off);
  }
  stored.error = sum(error);
  return stored;
}

// Tries to clip 0 to 13.5 % of the range at either end, in steps of 4.5 %; each clipping gives levels q, and
// levels give the best line by least squares, whose error follows from three sums. The best is refined by
// assigning levels anew (Lloyd's iteration). On normal data this leaves 8.1 % relative error, against 9.0 %
// for [min, max].
template <typename Weights>
LIGHTER_INLINE Stored search(const float* values, float low, float high, const Weights& weights) {
  const Stored whole_range = [&] {
    const uint16_t minimum = fp16_at_most(low);
    return store(values, fp16_at_least((high - fp16_to_fp32(minimum)) / kTop), minimum, weights);
  }();
  const float range = high - low;
  if (range < 1e-30f) return whole_range;

  Floats y[8];  // the values, moved to [0, 15]
  Floats y_sum = {};
  const float unit = range / kTop;
  const float inverse_unit = kTop / range;
  for (int i = 0; i < 8; ++i) {
    y[i] = (load(values + 8 * i) - low) * inverse_unit;
    y_sum += weights.times(i, y[i]);
  }
  const float total = sum(y_sum);
  constexpr float n = kSize;
  constexpr int clippings = 4;
  constexpr float clip = 0.045f;
  Fit best;
  float best_gain = -1;
  for (int bottom = 0; bottom < clippings; ++bottom) {
    for (int top = 0; top < clippings; ++top) {
      const float step = 1.0f - clip * static_cast<float>(bottom + top);
      const Fit f = fit(y, step, kTop * clip * static_cast<float>(bottom), weights);
      const float covariance = n * f.qy - f.q * total;
      const float variance = n * f.qq - f.q * f.q;
      const float gain =
          covariance * covariance / variance;  // the part of y's variance that the line explains
      if (gain > best_gain) {
        best_gain = gain;
        best = f;
      }
    }
  }
  float base = 0;
  for (int i = 0;; ++i) {
    const float step = (n * best.qy - best.q * total) / (n * best.qq - best.q * best.q);
    base = (total - step * best.q) / n;
    if (i == 3) break;
    best = fit(y, step, base, weights);
  }
  // The rounded minimum is a given for the scale.
  const uint16_t minimum = fp32_to_fp16(std::clamp(low + base * unit, -kLargestHalf, kLargestHalf));
  const float from_low = (fp16_to_fp32(minimum) - low) * inverse_unit;
  const float step = std::max(0.0f, (best.qy - from_low * best.q) / best.qq);
  const Stored searched = store(values, fp32_to_fp16(std::min(step * unit, kLargestHalf)), minimum, weights);
  return searched.error < whole_range.error ? searched : whole_range;
}

template <typename Weights>
LIGHTER_INLINE Stored search(const float* values, const Weights& weights) {
  Floats low = load(values), minus_high = -low;
  for (int i = 8; i < kSize; i += 8) {
    const Floats value = load(values + i);
    low = least(low, value);
    minus_high = least(minus_high, -value);
  }
  return search(values, least(low), -least(minus_high), weights);
}

LIGHTER_INLINE int64_t int4_groups(const float* values, int64_t groups, uint8_t* q, uint16_t* scales,
                                   uint16_t* minimums) {
  for (int64_t g = 0; g < groups; ++g, values += kSize, q += kSize / 2) {
    if (magnitude_bits<kSize>(values) > kLargestBits) return g;
    const Stored stored = search(values, Even());
    scales[g] = stored.scale;
    minimums[g] = stored.minimum;
    for (int i = 0; i < kSize / 2; i += 8) {
      const Ints lower = round_to_ints(stored_levels(load(values + i), stored));
      const Ints upper = round_to_ints(stored_levels(load(values + kSize / 2 + i), stored));
      const Bytes packed = __builtin_convertvector(lower | upper << 4, Bytes);
      std::memcpy(q + i, &packed, sizeof packed);
    }
  }
  return -1;
}

LIGHTER_INLINE bool gptq_row(const float* values, const GptqGroup& group, uint8_t* q, uint16_t* scale,
                             uint16_t* minimum, float* errors) {
  if (magnitude_bits<kSize>(values) > kLargestBits) return false;
  const Stored stored = search(values, Weighted{group.importance});
  *scale = stored.scale;
  *minimum = stored.minimum;
  const float step = fp16_to_fp32(stored.scale), base = fp16_to_fp32(stored.minimum);
  const float inverse = stored.scale == 0 ? 0.0f : 1.0f / step;
  float left[kSize], level[kSize];
  std::memcpy(left, values, sizeof left);
  for (int j = 0; j < kSize; ++j) {
    level[j] = std::clamp((left[j] - base) * inverse + kRounder - kRounder, 0.0f, kTop);
    const float* row = group.factor + j * kSize;
    errors[j] = (left[j] - base - level[j] * step) / row[j];
    // The factor is 0 before column j; what is at and before it is not looked at again.
    for (int k = j / 8 * 8; k < kSize; k += 8) {
      const Floats next = load(left + k) - load(row + k) * errors[j];
      std::memcpy(left + k, &next, sizeof next);
    }
  }
  for (int i = 0; i < kSize / 2; i += 8) {
    const Ints lower = round_to_ints(load(level + i));
    const Ints upper = round_to_ints(load(level + kSize / 2 + i));
    const Bytes packed = __builtin_convertvector(lower | upper << 4, Bytes);
    std::memcpy(q + i, &packed, sizeof packed);
  }
  return true;
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) int64_t int8_groups_avx2(const float* values, int64_t groups, int8_t* q,
                                                         uint16_t* scales) {
  return int8_groups(values, groups, q, scales);
}
__attribute__((target("avx2"))) int64_t int4_groups_avx2(const float* values, int64_t groups, uint8_t* q,
                                                         uint16_t* scales, uint16_t* minimums) {
  return int4_groups(values, groups, q, scales, minimums);
}
__attribute__((target("avx2"))) bool gptq_row_avx2(const float* values, const GptqGroup& group, uint8_t* q,
                                                   uint16_t* scale, uint16_t* minimum, float* errors) {
  return gptq_row(values, group, q, scale, minimum, errors);
}
#endif

}  // namespace

int64_t quantize_int8(const float* values, int64_t groups, int8_t* q, uint16_t* scales) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return int8_groups_avx2(values, groups, q, scales);
#endif
  return int8_groups(values, groups, q, scales);
}

int64_t quantize_int4(const float* values, int64_t groups, uint8_t* q, uint16_t* scales, uint16_t* minimums) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return int4_groups_avx2(values, groups, q, scales, minimums);
#endif
  return int4_groups(values, groups, q, scales, minimums);
}

bool gptq_int4(const float* values, const GptqGroup& group, uint8_t* q, uint16_t* scale, uint16_t* minimum,
               float* errors) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return gptq_row_avx2(values, group, q, scale, minimum, errors);
#endif
  return gptq_row(values, group, q, scale, minimum, errors);
}

}  // namespace lighter
