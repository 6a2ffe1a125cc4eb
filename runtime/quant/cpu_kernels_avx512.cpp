// The arithmetic of cpu_kernels.h with AVX-512 VNNI: one vector is the 16 lanes. Functions carry their
// target, so that this file needs no flags and nothing else in it is compiled for AVX-512.
#if defined(__x86_64__)
// g++ 12 takes its own intrinsics' "undefined" operands for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <algorithm>

#include "runtime/quant/cpu_kernels.h"

#define LIGHTER_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

namespace lighter::cpu_kernels {
namespace {

constexpr int kTokens = 4;  // at a time

// One block of rows for up to kTokens tokens.
template <int tokens>
struct Block {
  alignas(64) __m512 sums[tokens][kRowBlock];
  const uint8_t* weights;  // of the block's first row
  int64_t columns, groups;
  const int8_t* values[tokens];
  const int32_t* corrections[tokens];
  const float* factors[tokens];  // [kRowBlock, groups]: the weights' scale times the activations'
};

// factors of one token for the 16 rows, whose scales follow each other.
LIGHTER_AVX512 inline void multiply_scales(const uint16_t* scales, const float* activation_scales,
                                           int64_t groups, float* factors) {
  const int64_t step = 16 % groups;
  int64_t from = 0;  // of the period
  for (int64_t i = 0; i < groups; ++i) {
    const __m512 weight = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales) + i));
    _mm512_store_ps(factors + 16 * i, _mm512_mul_ps(weight, _mm512_loadu_ps(activation_scales + from)));
    _mm_prefetch(reinterpret_cast<const char*>(scales + 16 * (groups + i)),
                 _MM_HINT_T0);  // of the next block
    from += step;
    if (from >= groups) from -= groups;
  }
}

// Rows [row, row + rows) of the block.
template <int rows, int tokens>
LIGHTER_AVX512 inline void tile_int8(Block<tokens>& block, int row) {
  const uint8_t* w = block.weights + row * block.columns;
  const uint8_t* ahead = w + kPrefetchBytes;
  const int64_t groups = block.groups;
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512 sums[rows][tokens];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) sums[r][t] = _mm512_setzero_ps();
  }
  for (int64_t g = 0; g < groups; ++g) {
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const uint8_t* from = w + r * block.columns + g * 128;
      _mm_prefetch(reinterpret_cast<const char*>(ahead + (g * rows + r) * 128), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(ahead + (g * rows + r) * 128 + 64), _MM_HINT_T0);
      const __m512i w0 = _mm512_xor_si512(_mm512_loadu_si512(from), sign);
      const __m512i w1 = _mm512_xor_si512(_mm512_loadu_si512(from + 64), sign);
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) {
        const int8_t* a = block.values[t] + g * 128;
        __m512i dot = _mm512_loadu_si512(block.corrections[t] + g * kLanes);
        dot = _mm512_dpbusd_epi32(dot, w0, _mm512_loadu_si512(a));
        dot = _mm512_dpbusd_epi32(dot, w1, _mm512_loadu_si512(a + 64));
        const __m512 factor = _mm512_set1_ps(block.factors[t][(row + r) * groups + g]);
        sums[r][t] = _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(dot), sums[r][t]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) block.sums[t][row + r] = sums[r][t];
  }
}

template <int rows, int tokens>
LIGHTER_AVX512 inline void tile_int4(Block<tokens>& block, int row) {
  const int64_t row_bytes = block.columns / 2;
  const uint8_t* w = block.weights + row * row_bytes;
  const uint8_t* ahead = w + kPrefetchBytes;
  const int64_t groups = block.groups;
  const __m512i nibble = _mm512_set1_epi8(15);
  const __m512i halves = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
  __m512 sums[rows][tokens];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) sums[r][t] = _mm512_setzero_ps();
  }
  for (int64_t g = 0; g < groups; g += 2) {
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead + (g / 2 * rows + r) * 64), _MM_HINT_T0);
      const __m512i both = _mm512_loadu_si512(w + r * row_bytes + g * 32);
      const __m512i low = _mm512_and_si512(both, nibble);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) {
        const int8_t* a = block.values[t] + g * 64;
        __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, _mm512_loadu_si512(a));
        dot = _mm512_dpbusd_epi32(dot, high, _mm512_loadu_si512(a + 64));
        const float* two = block.factors[t] + (row + r) * groups + g;
        const __m512 pair = _mm512_castsi512_ps(
            _mm512_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(two))));
        const __m512 factor = _mm512_permutevar_ps(pair, halves);
        sums[r][t] = _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(dot), sums[r][t]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) block.sums[t][row + r] = sums[r][t];
  }
}

// Adds minimum * scaled sum to the 16 rows' lanes.
LIGHTER_AVX512 inline void add_minimums(const uint16_t* minimums, const float* scaled_sums, int64_t groups,
                                        __m512* sums) {
  for (int64_t row = 0; row < kRowBlock; ++row, minimums += groups) {
    _mm_prefetch(reinterpret_cast<const char*>(minimums + kRowBlock * groups),
                 _MM_HINT_T0);  // of the next block
    __m512 least = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g += 16) {
      const auto mask = static_cast<__mmask16>(0xFFFFu >> std::max<int64_t>(0, 16 - (groups - g)));
      const __m512 minimum = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, minimums + g));
      least = _mm512_fmadd_ps(minimum, _mm512_loadu_ps(scaled_sums + g), least);
    }
    sums[row] = _mm512_add_ps(sums[row], least);
  }
}

// Halves of two vectors: adds l and l + 8 of both. The result's lower half is a's, its upper b's.
LIGHTER_AVX512 inline __m512 fold8(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
}
// Then l and l + 4: quarters of a, a, b, b.
LIGHTER_AVX512 inline __m512 fold4(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}
// Then l and l + 2 in each quarter: pairs of a and b take turns.
LIGHTER_AVX512 inline __m512 fold2(__m512 a, __m512 b) {
  const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
  return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                       _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}
// Then neighbours.
LIGHTER_AVX512 inline __m512 fold1(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
}

// The 16 rows' sums over their lanes, as the tree of cpu_kernels.h.
LIGHTER_AVX512 inline __m512 reduce(const __m512* s) {
  __m512 quads[4];
  for (int i = 0; i < 4; ++i)
    quads[i] = fold4(fold8(s[4 * i], s[4 * i + 1]), fold8(s[4 * i + 2], s[4 * i + 3]));
  const __m512 folded = fold1(fold2(quads[0], quads[1]), fold2(quads[2], quads[3]));
  // Quarter i of folded holds the rows i, i + 4, i + 8, i + 12.
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  return _mm512_permutexvar_ps(order, folded);
}

template <SliceEncoding encoding, int tokens>
LIGHTER_AVX512 inline void run_block(const Matrix& matrix, const QuantizedActivations& x, int64_t row,
                                     int64_t token, float* result, int64_t stride) {
  constexpr bool int8 = encoding == SliceEncoding::int8;
  constexpr int64_t most_groups = int8 ? kMaxGroups8 : kMaxGroups4;
  alignas(64) float factors[tokens][kRowBlock * most_groups];
  Block<tokens> block;
  block.columns = x.columns();
  block.groups = x.groups();
  block.weights = matrix.values + row * block.columns / (int8 ? 1 : 2);
  for (int t = 0; t < tokens; ++t) {
    block.values[t] = x.values(token + t);
    block.corrections[t] = int8 ? x.corrections(token + t) : nullptr;
    block.factors[t] = factors[t];
    multiply_scales(matrix.scales + row * block.groups, x.scales(token + t), block.groups, factors[t]);
  }
  constexpr int rows = tokens == 1 ? 2 : 4;
  for (int r = 0; r < kRowBlock; r += rows) {
    if constexpr (int8) {
      tile_int8<rows>(block, r);
    } else {
      tile_int4<rows>(block, r);
    }
  }
  for (int t = 0; t < tokens; ++t) {
    if constexpr (!int8) {
      add_minimums(matrix.minimums + row * block.groups, x.scaled_sums(token + t), block.groups,
                   block.sums[t]);
    }
    _mm512_storeu_ps(result + (token + t) * stride, reduce(block.sums[t]));
  }
}

template <SliceEncoding encoding>
LIGHTER_AVX512 void rows(const Matrix& matrix, const QuantizedActivations& x, int64_t first_row,
                         int64_t count, float* result, int64_t stride) {
  for (int64_t r = 0; r < count; r += kRowBlock) {
    int64_t token = 0;
    for (; token + kTokens <= x.tokens(); token += kTokens) {
      run_block<encoding, kTokens>(matrix, x, first_row + r, token, result + r, stride);
    }
    const int64_t left = x.tokens() - token;
    if (left == 1) run_block<encoding, 1>(matrix, x, first_row + r, token, result + r, stride);
    if (left == 2) run_block<encoding, 2>(matrix, x, first_row + r, token, result + r, stride);
    if (left == 3) run_block<encoding, 3>(matrix, x, first_row + r, token, result + r, stride);
  }
}

}  // namespace

Kernels avx512_kernels() {
  return {rows<SliceEncoding::int8>, rows<SliceEncoding::int4>};
}

}  // namespace lighter::cpu_kernels
#endif
