// 8 to 16 tokens with AMX: a tile of weights is 16 rows as they lie, one of activations 64 values of 16
// tokens, so that an instruction multiplies 16 rows by 16 tokens. Fewer tokens go to AVX-512. Functions carry
// their target, so that this file needs no flags.
#if defined(__x86_64__)
// g++ 12 takes its own intrinsics' "undefined" operands for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "runtime/quant/cpu_kernels.h"

#define LIGHTER_AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,amx-tile,amx-int8")))
// The tile loads of g++ do not say that they read memory.
#define LIGHTER_STORES_DONE asm volatile("" ::: "memory")

namespace lighter::cpu_kernels {
namespace {

constexpr int64_t kLeastTokens = 8;
constexpr int64_t kTokens = 16;
constexpr int64_t kTileBytes = 1024;

// As the processor reads it. Tiles 0 and 1: dot products; 2 and 3: weights; 4 and 5: activations.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

LIGHTER_AMX void configure(int64_t rows) {
  TileConfig config;
  for (int tile = 0; tile < 4; ++tile) config.rows[tile] = static_cast<uint8_t>(rows);
  config.rows[4] = config.rows[5] = 16;
  LIGHTER_STORES_DONE;
  _tile_loadconfig(&config);
}

// The tokens' activations as tiles, of each 64 values one: [16 of 4 values][16 tokens][4]; missing tokens are
// zeros. Their factors: [groups][16 tokens].
struct TileTokens {
  alignas(64) int8_t tiles[kMaxPackedColumns * kTokens];
  alignas(64) float scales[kMaxGroups4 * kTokens];
  alignas(64) float sums[kMaxGroups4 * kTokens];  // int4: scaled
};

template <bool int8>
LIGHTER_AMX void pack(const Tokens& x, TileTokens& to) {
  const int64_t groups = x.rows.groups();
  const auto there = static_cast<__mmask16>((1u << x.count) - 1);
  alignas(64) int32_t rows[16] = {};  // distances from the first token
  const int8_t* first = x.rows.values(x[0]);
  for (int64_t t = 0; t < x.count; ++t) rows[t] = static_cast<int32_t>(x.rows.values(x[t]) - first);
  const __m512i index = _mm512_load_si512(rows);
  const int64_t tiles = x.rows.columns() / 64;
  int8_t* tile = to.tiles;
  for (int64_t i = 0; i < tiles; ++i) {
    for (int64_t four = 0; four < 16; ++four, tile += 64) {
      // int4: a group's halves lie 64 bytes apart, see QuantizedActivations.
      const int64_t at = int8 ? i * 64 + four * 4 : i / 2 * 128 + four / 8 * 64 + i % 2 * 32 + four % 8 * 4;
      _mm512_store_si512(tile,
                         _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, index, first + at, 1));
    }
  }
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t g = 0; g < groups; ++g) {
      to.scales[g * kTokens + t] = t < x.count ? x.rows.scales(x[t])[g] : 0.0f;
      if (!int8) to.sums[g * kTokens + t] = t < x.count ? x.rows.scaled_sums(x[t])[g] : 0.0f;
    }
  }
}

// `rows` rows of fp16 as fp32, [16, groups]; missing rows are zeros.
LIGHTER_AMX void widen(const uint16_t* from, int64_t row_groups, int64_t rows, int64_t groups, float* to) {
  for (int64_t row = 0; row < rows; ++row, from += row_groups, to += groups) {
    for (int64_t g = 0; g < groups; g += 16) {
      const auto there = static_cast<__mmask16>(0xFFFFu >> std::max<int64_t>(0, 16 - (groups - g)));
      _mm512_mask_storeu_ps(to + g, there, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, from + g)));
    }
  }
  std::fill_n(to, (kRowBlock - rows) * groups, 0.0f);
}

// sums[row] += a group's dot products [16 rows][16 tokens], scaled.
LIGHTER_AMX inline void add_group(const int32_t* dots, const float* weight_scales, int64_t groups,
                                  __m512 token_scales, __m512 (&sums)[kRowBlock]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRowBlock; ++r) {
    const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(weight_scales[r * groups]), token_scales);
    sums[r] = _mm512_fmadd_ps(factor, _mm512_cvtepi32_ps(_mm512_load_si512(dots + r * kTokens)), sums[r]);
  }
}

LIGHTER_AMX inline void prefetch_lines(const uint8_t* from, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i) _mm_prefetch(reinterpret_cast<const char*>(from + 64 * i), _MM_HINT_T0);
}

// `rows` rows; results: [16 rows][16 tokens].
LIGHTER_AMX void block_int8(const Matrix& matrix, int64_t row, int64_t rows, int64_t groups,
                            const TileTokens& x, float* results, PrefetchStream& ahead) {
  const uint8_t* w = matrix.values + row * matrix.row_bytes;
  float scales[kRowBlock * kMaxGroups8];
  widen(matrix.scales + row * matrix.row_groups, matrix.row_groups, rows, groups, scales);
  alignas(64) int32_t dots[2][kRowBlock * kTokens] = {};
  __m512 sums[kRowBlock];
#pragma GCC unroll 16
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups;) {
    int64_t steps = groups - g;
    const uint8_t* next = ahead.take_steps(2 * rows, steps, w + g * 128);
    for (const int64_t end = g + steps; g < end; ++g, next += 128 * rows) {
      prefetch_lines(next, 2 * rows);
      _tile_zero(0);
      _tile_loadd(2, w + g * 128, matrix.row_bytes);
      _tile_loadd(4, x.tiles + 2 * g * kTileBytes, 64);
      _tile_dpbssd(0, 2, 4);
      _tile_loadd(3, w + g * 128 + 64, matrix.row_bytes);
      _tile_loadd(5, x.tiles + (2 * g + 1) * kTileBytes, 64);
      _tile_dpbssd(0, 3, 5);
      _tile_stored(0, dots[g % 2], 64);
      add_group(dots[g % 2], scales + g, groups, _mm512_load_ps(x.scales + g * kTokens), sums);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRowBlock; ++r) _mm512_store_ps(results + r * kTokens, sums[r]);
}

// The nibbles of two groups of each row as bytes, a group to a tile.
LIGHTER_AMX inline void unpack(const uint8_t* from, int64_t row_bytes, int64_t rows, uint8_t* first,
                               uint8_t* second) {
  const __m512i nibble = _mm512_set1_epi8(15);
  for (int64_t r = 0; r < rows; ++r) {
    const __m512i both = _mm512_loadu_si512(from + r * row_bytes);
    const __m512i low = _mm512_and_si512(both, nibble);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    _mm512_store_si512(first + r * 64, _mm512_shuffle_i64x2(low, high, 0x44));
    _mm512_store_si512(second + r * 64, _mm512_shuffle_i64x2(low, high, 0xEE));
  }
}

// What the rows of a block in int4 are multiplied with, as fp32: [16, groups].
struct RowFactors {
  float scales[kRowBlock * kMaxGroups4];
  float minimums[kRowBlock * kMaxGroups4];
};

// sums += a pair of groups of `rows` rows, or the first of the pair only.
template <int count>
LIGHTER_AMX inline void add_pair(const uint8_t* from, int64_t row_bytes, int64_t rows, int64_t pair,
                                 const TileTokens& x, const RowFactors& factors, int64_t groups,
                                 __m512 (&sums)[kRowBlock]) {
  alignas(64) uint8_t weights[2][kTileBytes];
  alignas(64) int32_t dots[2][kRowBlock * kTokens];
  unpack(from, row_bytes, rows, weights[0], weights[1]);
  LIGHTER_STORES_DONE;
  _tile_zero(0);
  _tile_loadd(2, weights[0], 64);
  _tile_loadd(4, x.tiles + 2 * pair * kTileBytes, 64);
  _tile_dpbusd(0, 2, 4);
  _tile_stored(0, dots[0], 64);
  if constexpr (count == 2) {
    _tile_zero(1);
    _tile_loadd(3, weights[1], 64);
    _tile_loadd(5, x.tiles + (2 * pair + 1) * kTileBytes, 64);
    _tile_dpbusd(1, 3, 5);
    _tile_stored(1, dots[1], 64);
  }
#pragma GCC unroll 2
  for (int i = 0; i < count; ++i) {
    const int64_t g = 2 * pair + i;
    add_group(dots[i], factors.scales + g, groups, _mm512_load_ps(x.scales + g * kTokens), sums);
    const __m512 scaled_sums = _mm512_load_ps(x.sums + g * kTokens);
#pragma GCC unroll 16
    for (int r = 0; r < kRowBlock; ++r) {
      sums[r] = _mm512_fmadd_ps(_mm512_set1_ps(factors.minimums[r * groups + g]), scaled_sums, sums[r]);
    }
  }
}

LIGHTER_AMX void block_int4(const Matrix& matrix, int64_t row, int64_t rows, int64_t groups,
                            const TileTokens& x, float* results, PrefetchStream& ahead) {
  const uint8_t* w = matrix.values + row * matrix.row_bytes;
  const int64_t halves = row * matrix.row_groups;
  RowFactors factors;
  widen(matrix.scales + halves, matrix.row_groups, rows, groups, factors.scales);
  widen(matrix.minimums + halves, matrix.row_groups, rows, groups, factors.minimums);
  __m512 sums[kRowBlock];
#pragma GCC unroll 16
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  const int64_t pairs = groups / 2;
  for (int64_t p = 0; p < pairs;) {
    int64_t steps = pairs - p;
    const uint8_t* next = ahead.take_steps(rows, steps, w + p * 64);
    for (const int64_t end = p + steps; p < end; ++p, next += 64 * rows) {
      prefetch_lines(next, rows);
      add_pair<2>(w + p * 64, matrix.row_bytes, rows, p, x, factors, groups, sums);
    }
  }
  if (groups % 2 != 0) {
    ahead.ask_bytes(64 * rows);
    add_pair<1>(w + pairs * 64, matrix.row_bytes, rows, pairs, x, factors, groups, sums);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRowBlock; ++r) _mm512_store_ps(results + r * kTokens, sums[r]);
}

template <bool int8>
LIGHTER_AMX void rows(const Matrix& matrix, const Tokens& x, int64_t first_row, int64_t count, float* result,
                      int64_t stride, PrefetchStream& ahead) {
  if (x.count < kLeastTokens) {
    const Kernels few = avx512_kernels();
    return (int8 ? few.int8 : few.int4)(matrix, x, first_row, count, result, stride, ahead);
  }
  TileTokens tokens;
  pack<int8>(x, tokens);
  const int64_t groups = x.rows.groups();
  int64_t configured = 0;
  for (int64_t r = 0; r < count; r += kRowBlock) {
    const int64_t here = std::min(kRowBlock, count - r);
    if (here != configured) configure(here);
    configured = here;
    alignas(64) float results[kRowBlock * kTokens];
    (int8 ? block_int8 : block_int4)(matrix, first_row + r, here, groups, tokens, results, ahead);
    for (int64_t t = 0; t < x.count; ++t) {
      for (int64_t i = 0; i < here; ++i) result[t * stride + r + i] = results[i * kTokens + t];
    }
  }
  _tile_release();
}

}  // namespace

bool amx_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl; for the process
  static const bool permitted = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
                                syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
}

Kernels amx_kernels() {
  const Kernels few = avx512_kernels();
  const auto& [int8, int4] = few.rows_at_once;
  return {rows<true>, rows<false>, {{int8[0], int8[1], kRowBlock}, {int4[0], int4[1], kRowBlock}}};
}

}  // namespace lighter::cpu_kernels
#endif
