// The arithmetic of cpu_kernels.h with AVX2: two vectors are the 16 lanes. Functions carry their target, so
// that this file needs no flags.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>

#include "runtime/quant/cpu_kernels.h"

#define LIGHTER_AVX2 __attribute__((target("avx2,fma,f16c")))

namespace lighter::cpu_kernels {
namespace {

struct Lanes {
  __m256 low;   // lanes 0–7
  __m256 high;  // lanes 8–15
};

LIGHTER_AVX2 inline __m256i load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

// Sums of 4 products of signed bytes in [-127, 127]: pairs reach 2 * 127², which 16 bits hold.
LIGHTER_AVX2 inline __m256i dot_signed(__m256i w, __m256i a) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

LIGHTER_AVX2 inline __m256 scaled(float factor, __m256i dot, __m256 sum) {
  return _mm256_fmadd_ps(_mm256_set1_ps(factor), _mm256_cvtepi32_ps(dot), sum);
}

LIGHTER_AVX2 inline float reduce(const Lanes& lanes) {
  const __m256 by8 = _mm256_add_ps(lanes.low, lanes.high);
  const __m128 by4 = _mm_add_ps(_mm256_castps256_ps128(by8), _mm256_extractf128_ps(by8, 1));
  const __m128 by2 = _mm_add_ps(by4, _mm_movehl_ps(by4, by4));
  return _mm_cvtss_f32(_mm_add_ss(by2, _mm_movehdup_ps(by2)));
}

// 8 halves, of which `count` are there; the others become 0 and are not read.
LIGHTER_AVX2 inline __m256 load_halves(const uint16_t* from, int64_t count) {
  static constexpr int32_t masks[8] = {-1, -1, -1, -1, 0, 0, 0, 0};
  if (count < 8 && count > 0 && count % 2 != 0) {
    alignas(16) uint16_t there[8] = {};
    std::copy(from, from + count, there);
    return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(there)));
  }
  const int64_t words = std::clamp<int64_t>(count / 2, 0, 4);
  const __m128i mask = _mm_loadu_si128(reinterpret_cast<const __m128i*>(masks + 4 - words));
  return _mm256_cvtph_ps(_mm_maskload_epi32(reinterpret_cast<const int*>(from), mask));
}

// factors[i] = a row's scale times the activations', [groups]; writes up to 7 more.
LIGHTER_AVX2 inline void multiply_scales(const uint16_t* scales, const float* activation_scales,
                                         int64_t groups, float* factors) {
  for (int64_t g = 0; g < groups; g += 8) {
    const __m256 weight = load_halves(scales + g, groups - g);
    _mm256_storeu_ps(factors + g, _mm256_mul_ps(weight, _mm256_loadu_ps(activation_scales + g)));
  }
}

template <bool asks>
LIGHTER_AVX2 inline float row_int8(const Matrix& matrix, const QuantizedActivations& x, int64_t row,
                                   int64_t token, PrefetchStream& ahead) {
  const int64_t groups = x.groups();
  const uint8_t* w = matrix.values + row * matrix.row_bytes;
  const int8_t* a = x.values(token);
  float factors[kMaxGroups8 + 8];
  multiply_scales(matrix.scales + row * matrix.row_groups, x.scales(token), groups, factors);
  Lanes sum{_mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t g = 0; g < groups; ++g, w += 128, a += 128) {
    if constexpr (asks) {
      ahead.ask();
      ahead.ask();
    }
    const __m256i low =
        _mm256_add_epi32(dot_signed(load(w), load(a)), dot_signed(load(w + 64), load(a + 64)));
    const __m256i high =
        _mm256_add_epi32(dot_signed(load(w + 32), load(a + 32)), dot_signed(load(w + 96), load(a + 96)));
    sum.low = scaled(factors[g], low, sum.low);
    sum.high = scaled(factors[g], high, sum.high);
  }
  return reduce(sum);
}

// 32 bytes of nibbles, one group. a: its activations at a and a + 64, see QuantizedActivations.
LIGHTER_AVX2 inline __m256i dot_nibbles(const uint8_t* w, const int8_t* a) {
  const __m256i nibble = _mm256_set1_epi8(15);
  const __m256i both = load(w);
  const __m256i low = _mm256_and_si256(both, nibble);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
  // Four products to 16 bits: at most 4 * 15 * 127.
  const __m256i pairs =
      _mm256_add_epi16(_mm256_maddubs_epi16(low, load(a)), _mm256_maddubs_epi16(high, load(a + 64)));
  return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

template <bool asks>
LIGHTER_AVX2 inline float row_int4(const Matrix& matrix, const QuantizedActivations& x, int64_t row,
                                   int64_t token, PrefetchStream& ahead) {
  const int64_t groups = x.groups();
  const uint8_t* w = matrix.values + row * matrix.row_bytes;
  const int8_t* a = x.values(token);
  float factors[kMaxGroups4 + 8];
  multiply_scales(matrix.scales + row * matrix.row_groups, x.scales(token), groups, factors);
  Lanes sum{_mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t g = 0; g < groups; g += 2, w += 64, a += 128) {
    if constexpr (asks) ahead.ask();
    sum.low = scaled(factors[g], dot_nibbles(w, a), sum.low);
    sum.high = scaled(factors[g + 1], dot_nibbles(w + 32, a + 32), sum.high);
  }
  const uint16_t* minimums = matrix.minimums + row * matrix.row_groups;
  const float* sums = x.scaled_sums(token);
  Lanes least{_mm256_setzero_ps(), _mm256_setzero_ps()};
  for (int64_t g = 0; g < groups; g += 16) {
    least.low = _mm256_fmadd_ps(load_halves(minimums + g, groups - g), _mm256_loadu_ps(sums + g), least.low);
    least.high = _mm256_fmadd_ps(load_halves(minimums + g + 8, groups - g - 8), _mm256_loadu_ps(sums + g + 8),
                                 least.high);
  }
  return reduce({_mm256_add_ps(sum.low, least.low), _mm256_add_ps(sum.high, least.high)});
}

LIGHTER_AVX2 void rows_int8(const Matrix& matrix, const Tokens& x, int64_t first_row, int64_t count,
                            float* result, int64_t stride, PrefetchStream& ahead) {
  for (int64_t row = 0; row < count; ++row) {
    result[row] = row_int8<true>(matrix, x.rows, first_row + row, x[0], ahead);
    for (int64_t token = 1; token < x.count; ++token) {
      result[token * stride + row] = row_int8<false>(matrix, x.rows, first_row + row, x[token], ahead);
    }
  }
}

LIGHTER_AVX2 void rows_int4(const Matrix& matrix, const Tokens& x, int64_t first_row, int64_t count,
                            float* result, int64_t stride, PrefetchStream& ahead) {
  for (int64_t row = 0; row < count; ++row) {
    result[row] = row_int4<true>(matrix, x.rows, first_row + row, x[0], ahead);
    for (int64_t token = 1; token < x.count; ++token) {
      result[token * stride + row] = row_int4<false>(matrix, x.rows, first_row + row, x[token], ahead);
    }
  }
}

}  // namespace

Kernels avx2_kernels() {
  return {rows_int8, rows_int4};
}

}  // namespace lighter::cpu_kernels
#endif
