#include "runtime/quant/activations.h"

#if defined(__x86_64__)
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
LIGHTER_INLINE void quantize_groups(const float* values, int64_t groups, int8_t* q, float* scales) {
  for (int64_t g = 0; g < groups; ++g) scales[g] = quantize_group<count>(values + g * count, q + g * count);
}

#if defined(__x86_64__)
LIGHTER_AVX2 void quantize_avx2(int64_t size, const float* values, int64_t groups, int8_t* q, float* scales) {
  if (size == 128) return quantize_groups<128>(values, groups, q, scales);
  quantize_groups<64>(values, groups, q, scales);
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
    const __m256i taken = _mm256_mullo_epi32(sums, _mm256_set1_epi32(-128));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(corrections + half * 8), taken);
  }
}
#endif

// size: values a group, 128 or 64.
void quantize(int64_t size, const float* values, int64_t groups, int8_t* q, float* scales) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return quantize_avx2(size, values, groups, q, scales);
#endif
  if (size == 128) return quantize_groups<128>(values, groups, q, scales);
  quantize_groups<64>(values, groups, q, scales);
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

void QuantizedActivations::assign_row(int64_t token, const float* x) {
  float* scales = scales_.data() + token * (groups_ + kRepeat);
  int8_t* values = values_.data() + token * row_bytes();
  quantize(group_size(encoding_), x, groups_, values, scales);
  for (int64_t i = 0; i < kRepeat; ++i) scales[groups_ + i] = scales[i];
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
  const auto sum = [](const int8_t* group) {
    int32_t total = 0;
    for (int i = 0; i < 64; ++i) total += group[i];
    return static_cast<float>(total);
  };
  for (int64_t group = 0; group < groups_; ++group) sums[group] = scales(token)[group] * sum(q + group * 64);
  std::fill(sums + groups_, sums + padded_groups(), 0.0f);
  for (int64_t group = 0; group < groups_; group += 2, q += 128) std::swap_ranges(q + 32, q + 64, q + 64);
}

}  // namespace lighter
