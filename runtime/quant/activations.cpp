#include "runtime/quant/activations.h"

#if defined(__x86_64__)
// g++ 12 takes its own intrinsics' "undefined" operands for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <bit>
#include <limits>

namespace lighter {
namespace {

// Compiled twice: for baseline x86-64 (or any other processor) and for AVX2, without FMA, so that both round
// alike.
#if defined(__x86_64__)
#define LIGHTER_AVX2 __attribute__((target("avx2")))
#define LIGHTER_AVX512 __attribute__((target("avx512f")))
#endif
#define LIGHTER_INLINE inline __attribute__((always_inline))

// Returns the scale.
template <int count>
LIGHTER_INLINE float quantize_group(const float* values, int8_t* q) {
  // max|value| as the bits of a float, which order like the numbers and put infinity and NaN above them.
  int32_t bits = 0;
  for (int i = 0; i < count; ++i) bits = std::max(bits, std::bit_cast<int32_t>(values[i]) & 0x7FFFFFFF);
  const float most = std::bit_cast<float>(bits);
  const bool finite = most <= std::numeric_limits<float>::max();
  const float scale = finite ? most / 127.0f : std::numeric_limits<float>::quiet_NaN();
  if (!finite || scale == 0) {
    std::fill_n(q, count, int8_t{0});
    return scale;
  }
  for (int i = 0; i < count; ++i) {
    // Adding 1.5 * 2^23 rounds to nearest. Clamped, because a subnormal scale can be much less than most /
    // 127.
    constexpr int32_t zero = std::bit_cast<int32_t>(12582912.0f);
    const int32_t steps = std::bit_cast<int32_t>(values[i] / scale + 12582912.0f) - zero;
    q[i] = static_cast<int8_t>(std::min(127, std::max(-127, steps)));
  }
  return scale;
}

template <int count>
LIGHTER_INLINE void quantize_groups(const float* x, int64_t groups, int8_t* q, float* scales) {
  for (int64_t g = 0; g < groups; ++g) scales[g] = quantize_group<count>(x + g * count, q + g * count);
}

#if defined(__x86_64__)
LIGHTER_AVX2 void quantize_avx2(int64_t size, const float* x, int64_t groups, int8_t* q, float* scales) {
  if (size == 128) return quantize_groups<128>(x, groups, q, scales);
  quantize_groups<64>(x, groups, q, scales);
}

// The same values: a quotient is corrected by its remainder, and so rounded as a division rounds it
// (Markstein).
template <int count>
LIGHTER_AVX512 inline float quantize_group_avx512(const float* x, int8_t* q) {
  constexpr int vectors = count / 16;
  __m512 values[vectors];
  __m512i most = _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int i = 0; i < vectors; ++i) {
    values[i] = _mm512_loadu_ps(x + 16 * i);
    most = _mm512_max_epi32(most,
                            _mm512_and_si512(_mm512_castps_si512(values[i]), _mm512_set1_epi32(0x7FFFFFFF)));
  }
  const float scale = std::bit_cast<float>(_mm512_reduce_max_epi32(most)) / 127.0f;
  constexpr float least = 0x1p-90f;  // below, remainders could be subnormal
  if (!(scale >= least && scale <= std::numeric_limits<float>::max())) return quantize_group<count>(x, q);
  const __m512 divisor = _mm512_set1_ps(scale), inverse = _mm512_set1_ps(1.0f / scale);
#pragma GCC unroll 8
  for (int i = 0; i < vectors; ++i) {
    const __m512 quotient = _mm512_mul_ps(values[i], inverse);
    const __m512 remainder = _mm512_fnmadd_ps(quotient, divisor, values[i]);
    const __m512i steps = _mm512_cvtps_epi32(_mm512_fmadd_ps(remainder, inverse, quotient));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16 * i), _mm512_cvtepi32_epi8(steps));
  }
  return scale;
}

LIGHTER_AVX512 void quantize_avx512(int64_t size, const float* x, int64_t groups, int8_t* q, float* scales) {
  if (size == 128) {
    for (int64_t g = 0; g < groups; ++g) scales[g] = quantize_group_avx512<128>(x + g * 128, q + g * 128);
  } else {
    for (int64_t g = 0; g < groups; ++g) scales[g] = quantize_group_avx512<64>(x + g * 64, q + g * 64);
  }
}

// Sums of 4 neighbours, in 32 bits.
LIGHTER_AVX2 inline __m256i sum_fours(const int8_t* q) {
  const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
  const __m256i twos = _mm256_maddubs_epi16(_mm256_set1_epi8(1), four);
  return _mm256_madd_epi16(twos, _mm256_set1_epi16(1));
}

LIGHTER_AVX2 void correct_lanes_avx2(const int8_t* q, int64_t groups, int32_t* corrections) {
  for (int64_t half = 0; half < 2 * groups; ++half) {
    const int8_t* from = q + half / 2 * 128 + half % 2 * 32;
    const __m256i sums = _mm256_add_epi32(sum_fours(from), sum_fours(from + 64));
    const __m256i taken = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(sums, 7));  // -128 times
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(corrections + half * 8), taken);
  }
}

LIGHTER_AVX2 void sum_groups_avx2(const int8_t* q, int64_t groups, const float* scales, float* sums) {
  for (int64_t group = 0; group < groups; ++group, q += 64) {
    const __m256i eight = _mm256_add_epi32(sum_fours(q), sum_fours(q + 32));
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    const __m128i one = _mm_add_epi32(two, _mm_shuffle_epi32(two, 0xB1));
    sums[group] = scales[group] * static_cast<float>(_mm_cvtsi128_si32(one));
  }
}
#endif

// Each group's scale times the sum of its 64 values.
void sum_groups(const int8_t* q, int64_t groups, const float* scales, float* sums) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return sum_groups_avx2(q, groups, scales, sums);
#endif
  for (int64_t group = 0; group < groups; ++group, q += 64) {
    int32_t total = 0;
    for (int i = 0; i < 64; ++i) total += q[i];
    sums[group] = scales[group] * static_cast<float>(total);
  }
}

// size: values a group, 128 or 64.
void quantize(int64_t size, const float* x, int64_t groups, int8_t* q, float* scales) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return quantize_avx512(size, x, groups, q, scales);
  if (__builtin_cpu_supports("avx2")) return quantize_avx2(size, x, groups, q, scales);
#endif
  if (size == 128) return quantize_groups<128>(x, groups, q, scales);
  quantize_groups<64>(x, groups, q, scales);
}

}  // namespace

void QuantizedActivations::assign(SliceEncoding encoding, const float* x, int64_t tokens, int64_t columns) {
  resize(encoding, tokens, columns);
  for (int64_t token = 0; token < tokens; ++token) assign_row(token, x + token * columns);
}

void QuantizedActivations::resize(SliceEncoding encoding, int64_t tokens, int64_t columns) {
  static std::atomic<uint64_t> versions = 0;
  version_ = ++versions;
  encoding_ = encoding;
  tokens_ = tokens;
  columns_ = columns;
  groups_ = columns / group_size(encoding);
  const auto grow = [](auto& vector, int64_t size) {
    if (static_cast<int64_t>(vector.size()) < size) vector.resize(size);
  };
  grow(values_, tokens * row_bytes());
  grow(scales_, tokens * (groups_ + kRepeat));
  if (encoding == SliceEncoding::int8) {
    grow(corrections_, tokens * groups_ * kLanes);
  } else {
    grow(scaled_sums_, tokens * padded_groups());
  }
}

void QuantizedActivations::assign_row(int64_t token, const float* x, float weight) {
  quantize(group_size(encoding_), x, groups_, mutable_values(token), mutable_scales(token));
  complete_row(token, weight);
}

void QuantizedActivations::assign_quantized_row(int64_t token, const int8_t* q, const float* scales,
                                                float weight) {
  std::copy_n(q, columns_, mutable_values(token));
  std::copy_n(scales, groups_, mutable_scales(token));
  complete_row(token, weight);
}

// Of a row whose values lie in order: all that follows from them.
void QuantizedActivations::complete_row(int64_t token, float weight) {
  float* scales = mutable_scales(token);
  for (int64_t i = 0; i < groups_; ++i) scales[i] *= weight;
  for (int64_t i = 0; i < kRepeat; ++i) scales[groups_ + i] = scales[i];
  int8_t* values = mutable_values(token);
  std::fill(values + columns_, values + row_bytes(), int8_t{0});
  if (encoding_ == SliceEncoding::int8) {
    correct_lanes(token);
  } else {
    interleave_pairs(token);
  }
}

void QuantizedActivations::correct_lanes(int64_t token) {
  int32_t* corrections = corrections_.data() + token * groups_ * kLanes;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return correct_lanes_avx2(values(token), groups_, corrections);
#endif
  const int8_t* q = values(token);
  for (int64_t group = 0; group < groups_; ++group, q += 128, corrections += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      int32_t sum = 0;
      for (int64_t i = 4 * lane; i < 4 * lane + 4; ++i) sum += q[i] + q[i + 64];
      corrections[lane] = -128 * sum;
    }
  }
}

void QuantizedActivations::interleave_pairs(int64_t token) {
  float* sums = scaled_sums_.data() + token * padded_groups();
  int8_t* q = values_.data() + token * row_bytes();
  sum_groups(q, groups_, scales(token), sums);
  std::fill(sums + groups_, sums + padded_groups(), 0.0f);
  for (int64_t group = 0; group < groups_; group += 2, q += 128) std::swap_ranges(q + 32, q + 64, q + 64);
}

}  // namespace lighter
