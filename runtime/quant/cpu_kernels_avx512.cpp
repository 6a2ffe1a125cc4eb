// The arithmetic of cpu_kernels.h with AVX-512 VNNI: one vector is the 16 lanes. Functions carry their
// target, so that this file needs no flags and nothing else in it is compiled for AVX-512.
#if defined(__x86_64__)
// g++ 12 takes its own intrinsics' "undefined" operands for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include <algorithm>
#include <type_traits>

#include "runtime/quant/cpu_kernels.h"

#define LIGHTER_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

namespace lighter::cpu_kernels {
namespace {

constexpr int kMostRows = 4;  // long ones, at a time
// The same for one token, in int8 and in int4. In int8 15 threads read 4 to 6 % more than one row at a time.
constexpr int kRowsOfOneToken[] = {kMostRows, 2};
constexpr int kTokens = 4;         // at a time
constexpr int64_t kShortRow = 16;  // groups

// One block of rows for up to kTokens tokens.
template <int tokens>
struct Block {
  alignas(64) __m512 sums[tokens][kRowBlock];
  const uint8_t* weights;  // of the block's first row
  int64_t row_bytes, groups;
  const int8_t* values[tokens];
  const int32_t* corrections[tokens];
  const float* factors[tokens];  // [kRowBlock, factor_stride]: the weights' scale times the activations'
  int64_t factor_stride;
};

LIGHTER_AVX512 inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(0xFFFFu >> std::max<int64_t>(0, 16 - count));
}

inline void prefetch_halves(const uint16_t* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 32) _mm_prefetch(reinterpret_cast<const char*>(from + i), _MM_HINT_T0);
}

LIGHTER_AVX512 inline __m512 from_halves(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
LIGHTER_AVX512 inline __m512 from_halves(const uint16_t* from, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), from));
}

// Factors of one token for `rows` rows whose scales follow each other; factor_stride is groups.
LIGHTER_AVX512 inline void multiply_scales(const uint16_t* scales, int64_t rows,
                                           const float* activation_scales, int64_t groups, float* factors) {
  const int64_t step = 16 % groups, count = rows * groups;
  int64_t from = 0;  // of the period
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    _mm512_store_ps(factors + i,
                    _mm512_mul_ps(from_halves(scales + i), _mm512_loadu_ps(activation_scales + from)));
    from += step;
    if (from >= groups) from -= groups;
  }
  if (i == count) return;
  const __m512 weight = from_halves(scales + i, count - i);
  _mm512_store_ps(factors + i, _mm512_mul_ps(weight, _mm512_loadu_ps(activation_scales + from)));
}

// The same for rows of scales that do not; factor_stride is groups, rounded up to 16.
LIGHTER_AVX512 inline void multiply_scales(const uint16_t* scales, int64_t row_groups, int64_t rows,
                                           const float* activation_scales, int64_t groups, float* factors) {
  for (int64_t row = 0; row < rows; ++row, scales += row_groups) {
    for (int64_t g = 0; g < groups; g += 16, factors += 16) {
      const __m512 weight = from_halves(scales + g, groups - g);
      _mm512_store_ps(factors, _mm512_mul_ps(weight, _mm512_loadu_ps(activation_scales + g)));
    }
  }
}

// Loaded once: else g++ 12 makes it an operand in memory of each instruction that uses it.
LIGHTER_AVX512 inline void keep(__m512i& vector) {
  asm("" : "+v"(vector));
}

// One group (int8) or pair of groups (int4) of a row: its weights, and their products with one token's
// activations.
struct Int8 {
  static constexpr int64_t kGroups = 1;
  static constexpr int64_t kBytes = 128;
  __m512i first, second;

  LIGHTER_AVX512 explicit Int8(const uint8_t* from) {
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    first = _mm512_xor_si512(_mm512_loadu_si512(from), sign);
    second = _mm512_xor_si512(_mm512_loadu_si512(from + 64), sign);
  }
  LIGHTER_AVX512 static __m512i start(const int32_t* corrections, int64_t g) {
    return _mm512_loadu_si512(corrections + g * kLanes);
  }
  LIGHTER_AVX512 static __m512 factor(const float* of) { return _mm512_set1_ps(*of); }
};

struct Int4 {
  static constexpr int64_t kGroups = 2;
  static constexpr int64_t kBytes = 64;
  __m512i first, second;

  LIGHTER_AVX512 explicit Int4(const uint8_t* from) {
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i both = _mm512_loadu_si512(from);
    keep(both);
    first = _mm512_and_si512(both, nibble);
    second = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
  }
  LIGHTER_AVX512 static __m512i start(const int32_t*, int64_t) { return _mm512_setzero_si512(); }
  // The first group's in lanes 0–7, the second's in 8–15.
  LIGHTER_AVX512 static __m512 factor(const float* of) {
    const __m512i halves = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    double pair;
    __builtin_memcpy(&pair, of, sizeof pair);
    return _mm512_permutevar_ps(_mm512_castpd_ps(_mm512_set1_pd(pair)), halves);
  }
};

// Rows [row, row + rows) of the block.
template <typename Weights, int rows, bool asks, int tokens>
LIGHTER_AVX512 inline void tile(Block<tokens>& block, int64_t row, PrefetchStream& ahead) {
  constexpr int64_t bytes = Weights::kBytes;
  constexpr int64_t lines = bytes / 64;
  const uint8_t* w = block.weights + row * block.row_bytes;
  const int64_t steps = (block.groups + Weights::kGroups - 1) / Weights::kGroups;
  __m512 sums[rows][tokens];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) sums[r][t] = _mm512_setzero_ps();
  }
  for (int64_t s = 0; s < steps;) {
    int64_t here = steps - s;
    const uint8_t* next = w + s * bytes;
    if constexpr (asks) next = ahead.take_steps(lines * rows, here, next);
    for (const int64_t end = s + here; s < end; ++s, next += bytes * rows) {
      const int64_t g = s * Weights::kGroups;
      __m512i first[tokens], second[tokens], start[tokens];
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) {
        first[t] = _mm512_loadu_si512(block.values[t] + s * 128);
        second[t] = _mm512_loadu_si512(block.values[t] + s * 128 + 64);
        start[t] = Weights::start(block.corrections[t], g);
        if constexpr (tokens == 1 && rows > 1) {
          keep(first[t]);
          keep(second[t]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) {
        if constexpr (asks) {
#pragma GCC unroll 2
          for (int64_t line = 0; line < lines; ++line) {
            _mm_prefetch(reinterpret_cast<const char*>(next + (r * lines + line) * 64), _MM_HINT_T1);
          }
        }
        const Weights weights(w + r * block.row_bytes + s * bytes);
#pragma GCC unroll 4
        for (int t = 0; t < tokens; ++t) {
          __m512i dot = _mm512_dpbusd_epi32(start[t], weights.first, first[t]);
          dot = _mm512_dpbusd_epi32(dot, weights.second, second[t]);
          const __m512 factor = Weights::factor(block.factors[t] + (row + r) * block.factor_stride + g);
          sums[r][t] = _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(dot), sums[r][t]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) block.sums[t][row + r] = sums[r][t];
  }
}

// Adds minimum * scaled sum to the lanes of `rows` rows.
LIGHTER_AVX512 inline void add_minimums(const uint16_t* minimums, int64_t row_groups, int64_t rows,
                                        const float* scaled_sums, int64_t groups, __m512* sums) {
  int64_t row = 0;
  if (groups == 8 && row_groups == 8) {  // two rows at a time
    const __m512 once = _mm512_castps256_ps512(_mm256_loadu_ps(scaled_sums));
    const __m512 both = _mm512_shuffle_f32x4(once, once, 0x44);
    for (; row + 2 <= rows; row += 2, minimums += 16) {
      const __m512 least = _mm512_fmadd_ps(from_halves(minimums), both, _mm512_setzero_ps());
      sums[row] = _mm512_add_ps(sums[row], _mm512_maskz_mov_ps(0x00FF, least));
      sums[row + 1] = _mm512_add_ps(sums[row + 1], _mm512_maskz_shuffle_f32x4(0x00FF, least, least, 0x0E));
    }
  }
  for (; row < rows; ++row, minimums += row_groups) {
    __m512 least = _mm512_setzero_ps();
    int64_t g = 0;
    for (; g + 16 <= groups; g += 16) {
      least = _mm512_fmadd_ps(from_halves(minimums + g), _mm512_loadu_ps(scaled_sums + g), least);
    }
    if (g < groups) {
      least = _mm512_fmadd_ps(from_halves(minimums + g, groups - g), _mm512_loadu_ps(scaled_sums + g), least);
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

template <typename Weights, int at_once, bool asks, int tokens>
LIGHTER_AVX512 inline void tiles(Block<tokens>& block, int64_t count, PrefetchStream& ahead) {
  int64_t r = 0;
  for (; r + at_once <= count; r += at_once) tile<Weights, at_once, asks>(block, r, ahead);
  for (; r < count; ++r) tile<Weights, 1, asks>(block, r, ahead);
}

// `count` rows (at most kRowBlock) for the tokens from x[token] on; the first tokens' pass asks for more
// weights.
template <SliceEncoding encoding, int tokens, bool asks>
LIGHTER_AVX512 inline void run_block(const Matrix& matrix, const Tokens& x, int64_t row, int64_t count,
                                     int64_t token, float* result, int64_t stride, PrefetchStream& ahead) {
  constexpr bool int8 = encoding == SliceEncoding::int8;
  using Weights = std::conditional_t<int8, Int8, Int4>;
  constexpr int64_t most_groups = int8 ? kMaxGroups8 : kMaxGroups4;
  alignas(64) float factors[tokens][kRowBlock * most_groups];
  Block<tokens> block;
  block.row_bytes = matrix.row_bytes;
  block.groups = x.rows.groups();
  block.weights = matrix.values + row * matrix.row_bytes;
  const uint16_t* scales = matrix.scales + row * matrix.row_groups;
  const bool run = matrix.row_groups == block.groups;  // of all rows' scales
  block.factor_stride = run ? block.groups : (block.groups + 15) / 16 * 16;
  for (int t = 0; t < tokens; ++t) {
    const int64_t at = x[token + t];
    block.values[t] = x.rows.values(at);
    block.corrections[t] = int8 ? x.rows.corrections(at) : nullptr;
    block.factors[t] = factors[t];
    if (run) {
      multiply_scales(scales, count, x.rows.scales(at), block.groups, factors[t]);
    } else {
      multiply_scales(scales, matrix.row_groups, count, x.rows.scales(at), block.groups, factors[t]);
    }
  }
  // Few long rows side by side, because the weights are asked for row after row.
  constexpr int of_long_rows = tokens == 1 ? kRowsOfOneToken[int8 ? 0 : 1] : kMostRows;
  constexpr int of_short_rows = tokens == 1 ? 2 * kMostRows : kMostRows;
  if (block.groups <= kShortRow) {
    tiles<Weights, of_short_rows, asks>(block, count, ahead);
  } else {
    tiles<Weights, of_long_rows, asks>(block, count, ahead);
  }
  for (int t = 0; t < tokens; ++t) {
    for (int64_t none = count; none < kRowBlock; ++none) block.sums[t][none] = _mm512_setzero_ps();
    if constexpr (!int8) {
      add_minimums(matrix.minimums + row * matrix.row_groups, matrix.row_groups, count,
                   x.rows.scaled_sums(x[token + t]), block.groups, block.sums[t]);
    }
    _mm512_mask_storeu_ps(result + (token + t) * stride, first_lanes(count), reduce(block.sums[t]));
  }
}

template <SliceEncoding encoding, bool asks>
LIGHTER_AVX512 inline void run_last(const Matrix& matrix, const Tokens& x, int64_t row, int64_t count,
                                    int64_t token, float* result, int64_t stride, PrefetchStream& ahead) {
  switch (x.count - token) {
    case 1:
      return run_block<encoding, 1, asks>(matrix, x, row, count, token, result, stride, ahead);
    case 2:
      return run_block<encoding, 2, asks>(matrix, x, row, count, token, result, stride, ahead);
    case 3:
      return run_block<encoding, 3, asks>(matrix, x, row, count, token, result, stride, ahead);
  }
}

template <SliceEncoding encoding>
LIGHTER_AVX512 void rows(const Matrix& matrix, const Tokens& x, int64_t first_row, int64_t count,
                         float* result, int64_t stride, PrefetchStream& ahead) {
  for (int64_t r = 0; r < count; r += kRowBlock) {
    const int64_t row = first_row + r;
    const int64_t here = std::min(kRowBlock, count - r);
    const int64_t then = std::min(kRowBlock, count - r - here) * matrix.row_groups;
    const int64_t at = (row + here) * matrix.row_groups;
    prefetch_halves(matrix.scales + at, then);
    if constexpr (encoding == SliceEncoding::int4) prefetch_halves(matrix.minimums + at, then);
    if (x.count < kTokens) {
      run_last<encoding, true>(matrix, x, row, here, 0, result + r, stride, ahead);
      continue;
    }
    run_block<encoding, kTokens, true>(matrix, x, row, here, 0, result + r, stride, ahead);
    int64_t token = kTokens;
    for (; token + kTokens <= x.count; token += kTokens) {
      run_block<encoding, kTokens, false>(matrix, x, row, here, token, result + r, stride, ahead);
    }
    run_last<encoding, false>(matrix, x, row, here, token, result + r, stride, ahead);
  }
}

}  // namespace

Kernels avx512_kernels() {
  return {rows<SliceEncoding::int8>,
          rows<SliceEncoding::int4>,
          {{kRowsOfOneToken[0], kMostRows}, {kRowsOfOneToken[1], kMostRows}}};
}

}  // namespace lighter::cpu_kernels
#endif
