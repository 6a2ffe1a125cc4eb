// Several tokens, up to 16, with AMX: a tile of weights is 16 rows as they lie, one of activations 64 values
// of each token, so that an instruction multiplies 16 rows by all tokens. Products go through memory, since a
// tile has no other way to a vector; a load waits until the store before it has left the processor's store
// buffer, so each step's products are used a step later. Up to four tokens' products of four rows lie in one
// vector, those of more tokens of one row. One token goes to AVX-512. Functions carry their target, so that
// this file needs no flags.
#if defined(__x86_64__)
// g++ 12 takes its own intrinsics' "undefined" operands for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <memory>

#include "runtime/quant/cpu_kernels.h"

#define LIGHTER_AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,amx-tile,amx-int8")))
// The tile loads of g++ do not say that they read memory.
#define LIGHTER_STORES_DONE asm volatile("" ::: "memory")

namespace lighter::cpu_kernels {
namespace {

constexpr int64_t kTokens = 16;
constexpr int64_t kFew = 4;
constexpr int64_t kTileBytes = 1024;

constexpr int kBlocks = 2;  // of 16 rows, side by side

// As the processor reads it. Tiles 0 and 1: dot products, of a block each; 4 and 5: activations; 6 and 7:
// weights.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

LIGHTER_AMX void configure(int64_t columns) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile)
    config.row_bytes[tile] = static_cast<uint16_t>(tile < 6 ? 4 * columns : 64);
  LIGHTER_STORES_DONE;
  _tile_loadconfig(&config);
}

// The tokens' activations as tiles, of each 64 values one: [16 of 4 values][columns][4]; columns: the tokens,
// and zeros up to a multiple of 4. Their factors: [groups][16 tokens], beyond the tokens zeros.
struct TileTokens {
  alignas(64) int8_t tiles[kMaxPackedColumns * kTokens];
  alignas(64) float scales[kMaxGroups4 * kTokens];
  alignas(64) float sums[kMaxGroups4 * kTokens];  // int4: scaled
  int64_t columns = 0;

  // What it was made of.
  uint64_t version = 0;
  int64_t count = 0;
  std::array<int64_t, kTokens> numbers;

  int64_t tile_bytes() const { return 64 * columns; }
};

template <bool int8>
LIGHTER_AMX void pack(const Tokens& x, TileTokens& to) {
  const int64_t groups = x.rows.groups();
  to.columns = (x.count + 3) / 4 * 4;
  const auto there = static_cast<__mmask16>((1u << x.count) - 1);
  const auto stored = static_cast<__mmask16>((1u << to.columns) - 1);
  alignas(64) int32_t rows[16] = {};  // distances from the first token
  const int8_t* first = x.rows.values(x[0]);
  for (int64_t t = 0; t < x.count; ++t) rows[t] = static_cast<int32_t>(x.rows.values(x[t]) - first);
  const __m512i index = _mm512_load_si512(rows);
  const int64_t tiles = x.rows.columns() / 64;
  int8_t* tile = to.tiles;
  for (int64_t i = 0; i < tiles; ++i) {
    for (int64_t four = 0; four < 16; ++four, tile += 4 * to.columns) {
      // int4: a group's halves lie 64 bytes apart, see QuantizedActivations.
      const int64_t at = int8 ? i * 64 + four * 4 : i / 2 * 128 + four / 8 * 64 + i % 2 * 32 + four % 8 * 4;
      _mm512_mask_storeu_epi32(
          tile, stored, _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there, index, first + at, 1));
    }
  }
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t g = 0; g < groups; ++g) {
      to.scales[g * kTokens + t] = t < x.count ? x.rows.scales(x[t])[g] : 0.0f;
      if (!int8) to.sums[g * kTokens + t] = t < x.count ? x.rows.scaled_sums(x[t])[g] : 0.0f;
    }
  }
}

// This thread's newest, since many calls in a row multiply the same tokens.
template <bool int8>
const TileTokens& packed(const Tokens& x) {
  static thread_local std::unique_ptr<TileTokens> newest;
  if (newest == nullptr) newest = std::make_unique<TileTokens>();
  std::array<int64_t, kTokens> numbers{};
  for (int64_t t = 0; t < x.count; ++t) numbers[static_cast<size_t>(t)] = x[t];
  if (newest->version != x.rows.version() || newest->count != x.count || newest->numbers != numbers) {
    newest->version = 0;
    pack<int8>(x, *newest);
    newest->version = x.rows.version();
    newest->count = x.count;
    newest->numbers = numbers;
  }
  return *newest;
}

// Rows of fp16 as fp32, [rows, groups].
LIGHTER_AMX void widen(const uint16_t* from, int64_t row_groups, int64_t rows, int64_t groups, float* to) {
  for (int64_t row = 0; row < rows; ++row, from += row_groups, to += groups) {
    for (int64_t g = 0; g < groups; g += 16) {
      const auto there = static_cast<__mmask16>(0xFFFFu >> std::max<int64_t>(0, 16 - (groups - g)));
      _mm512_mask_storeu_ps(to + g, there, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, from + g)));
    }
  }
}

LIGHTER_AMX inline void prefetch_lines(const uint8_t* from, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i) _mm_prefetch(reinterpret_cast<const char*>(from + 64 * i), _MM_HINT_T1);
}

// fp16 of kRowBlock rows as fp32 by group, [groups, stride]. At least two groups.
LIGHTER_AMX void widen_by_group(const uint16_t* from, int64_t row_groups, int64_t groups, float* to,
                                int64_t stride) {
  const __m512i rows =
      _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                         _mm512_set1_epi32(static_cast<int>(row_groups)));
  for (int64_t g = 0; g < groups; g += 2) {
    const int64_t at = std::min(g, groups - 2);  // two at once
    const __m512i both = _mm512_i32gather_epi32(rows, from + at, 2);
    const auto widened = [&](__m512i halves)
                             LIGHTER_AMX { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(halves)); };
    _mm512_storeu_ps(to + at * stride, widened(both));
    _mm512_storeu_ps(to + (at + 1) * stride, widened(_mm512_srli_epi32(both, 16)));
  }
}

LIGHTER_AMX inline void transpose(__m512 (&rows)[16]) {
  __m512 twos[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    twos[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    twos[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  __m512 fours[16];  // quarter q of fours[4i + j]: column 4q + j of the rows 4i to 4i + 3
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const auto pair = [&](int at) LIGHTER_AMX { return _mm512_castps_pd(twos[i + at]); };
    fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair(0), pair(2)));
    fours[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair(0), pair(2)));
    fours[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pair(1), pair(3)));
    fours[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pair(1), pair(3)));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even_above = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0x88),
                 odd_above = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0xDD),
                 even_below = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0x88),
                 odd_below = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0xDD);
    rows[j] = _mm512_shuffle_f32x4(even_above, even_below, 0x88);
    rows[4 + j] = _mm512_shuffle_f32x4(odd_above, odd_below, 0x88);
    rows[8 + j] = _mm512_shuffle_f32x4(even_above, even_below, 0xDD);
    rows[12 + j] = _mm512_shuffle_f32x4(odd_above, odd_below, 0xDD);
  }
}

// What blocks of rows are multiplied with, as fp32: [rows, groups]. And their products with all tokens:
// integers of one step and the one before it, and the sums of all.
template <int blocks, int64_t most_groups, int groups_of_step>
struct ManyTokens {
  static constexpr int kRows = blocks * kRowBlock;
  static constexpr int64_t kTokensStored = kTokens;
  alignas(64) int32_t dots[2][groups_of_step][kRows][kTokens] = {};
  alignas(64) float sums[kRows][kTokens] = {};
  float scales[kRows * most_groups];
  float minimums[groups_of_step > 1 ? kRows* most_groups : 1];  // int4

  LIGHTER_AMX static void take(const uint16_t* from, int64_t row_groups, int64_t groups, float* to) {
    widen(from, row_groups, kRows, groups, to);
  }
  // Group g's products to the sums, after its minima times the activations' sums.
  template <bool with_minimums>
  LIGHTER_AMX inline void add(const int32_t (&products)[kRows][kTokens], const TileTokens& x, int64_t groups,
                              int64_t g) {
    const __m512 token_scales = _mm512_load_ps(x.scales + g * kTokens),
                 scaled_sums = with_minimums ? _mm512_load_ps(x.sums + g * kTokens) : _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(scales[r * groups + g]), token_scales);
      const __m512 dot = _mm512_cvtepi32_ps(_mm512_load_si512(products[r]));
      __m512 sum = _mm512_load_ps(sums[r]);
      if (with_minimums) sum = _mm512_fmadd_ps(_mm512_set1_ps(minimums[r * groups + g]), scaled_sums, sum);
      _mm512_store_ps(sums[r], _mm512_fmadd_ps(factor, dot, sum));
    }
  }
  // result[t * stride + r]
  LIGHTER_AMX void write(int64_t tokens, float* result, int64_t stride) const {
    for (int r = 0; r < kRows; r += kRowBlock) {
      __m512 rows[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) rows[i] = _mm512_load_ps(sums[r + i]);
      transpose(rows);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        if (t < tokens) _mm512_storeu_ps(result + t * stride + r, rows[t]);
      }
    }
  }
};

// The same for up to kFew tokens; scales are [groups, rows].
template <int blocks, int64_t most_groups, int groups_of_step>
struct FewTokens {
  static constexpr int kRows = blocks * kRowBlock;
  static constexpr int kVectors = kRows / 4;
  static constexpr int64_t kTokensStored = kFew;
  alignas(64) int32_t dots[2][groups_of_step][kRows][kFew] = {};
  __m512 sums[kVectors];
  alignas(64) float scales[most_groups * kRows];
  alignas(64) float minimums[groups_of_step > 1 ? most_groups* kRows : 1];

  LIGHTER_AMX FewTokens() {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) sums[i] = _mm512_setzero_ps();
  }
  LIGHTER_AMX static void take(const uint16_t* from, int64_t row_groups, int64_t groups, float* to) {
    for (int row = 0; row < kRows; row += kRowBlock)
      widen_by_group(from + row * row_groups, row_groups, groups, to + row, kRows);
  }
  template <bool with_minimums>
  LIGHTER_AMX inline void add(const int32_t (&products)[kRows][kFew], const TileTokens& x, int64_t,
                              int64_t g) {
    const __m512 token_scales = _mm512_broadcast_f32x4(_mm_load_ps(x.scales + g * kTokens)),
                 scaled_sums = with_minimums ? _mm512_broadcast_f32x4(_mm_load_ps(x.sums + g * kTokens))
                                             : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      // Each of the four rows' value four times.
      const __m512i rows = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
      const auto of_rows = [&](const float* values) LIGHTER_AMX {
        return _mm512_permutexvar_ps(rows, _mm512_broadcast_f32x4(_mm_load_ps(values + g * kRows + 4 * i)));
      };
      const __m512 factor = _mm512_mul_ps(of_rows(scales), token_scales);
      const __m512 dot = _mm512_cvtepi32_ps(_mm512_load_si512(products[4 * i]));
      __m512 sum = sums[i];
      if (with_minimums) sum = _mm512_fmadd_ps(of_rows(minimums), scaled_sums, sum);
      sums[i] = _mm512_fmadd_ps(factor, dot, sum);
    }
  }
  LIGHTER_AMX void write(int64_t tokens, float* result, int64_t stride) const {
    const __m512i by_token = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    for (int b = 0; b < blocks; ++b) {
      __m512 q[4];  // a quarter for each token
      for (int i = 0; i < 4; ++i) q[i] = _mm512_permutexvar_ps(by_token, sums[4 * b + i]);
      const __m512 low01 = _mm512_shuffle_f32x4(q[0], q[1], 0x44),
                   low23 = _mm512_shuffle_f32x4(q[2], q[3], 0x44),
                   high01 = _mm512_shuffle_f32x4(q[0], q[1], 0xEE),
                   high23 = _mm512_shuffle_f32x4(q[2], q[3], 0xEE);
      const __m512 of[4] = {
          _mm512_shuffle_f32x4(low01, low23, 0x88), _mm512_shuffle_f32x4(low01, low23, 0xDD),
          _mm512_shuffle_f32x4(high01, high23, 0x88), _mm512_shuffle_f32x4(high01, high23, 0xDD)};
      for (int64_t t = 0; t < tokens; ++t) _mm512_storeu_ps(result + t * stride + b * kRowBlock, of[t]);
    }
  }
};

// OPERATION(block, ...) for each block: tiles have numbers that are known when this is compiled.
#define LIGHTER_FOR_BLOCKS(OPERATION, ...) \
  OPERATION(0, __VA_ARGS__);               \
  if constexpr (blocks > 1) {              \
    OPERATION(1, __VA_ARGS__);             \
  }
#define LIGHTER_STORE(block, dots) _tile_stored(block, (dots)[(block)*kRowBlock], 4 * Room::kTokensStored)

// The two halves of a group, of activations in the tiles 4 and 5.
#define LIGHTER_BEGIN(block, from)                             \
  _tile_zero(block);                                           \
  _tile_loadd(6, (from) + (block)*kRowBlock * stride, stride); \
  _tile_dpbssd(block, 6, 4)
#define LIGHTER_END(block, from)                               \
  _tile_loadd(7, (from) + (block)*kRowBlock * stride, stride); \
  _tile_dpbssd(block, 7, 5)

template <int blocks, template <int, int64_t, int> typename Rooms>
struct Int8Blocks {
  using Room = Rooms<blocks, kMaxGroups8, 1>;

  LIGHTER_AMX static void run(const Matrix& matrix, int64_t row, int64_t groups, const TileTokens& x,
                              Room& room, PrefetchStream& ahead) {
    const uint8_t* const w = matrix.values + row * matrix.row_bytes;
    const int64_t stride = matrix.row_bytes, tile_bytes = x.tile_bytes(), x_stride = tile_bytes / 16;
    Room::take(matrix.scales + row * matrix.row_groups, matrix.row_groups, groups, room.scales);
    const auto add = [&](int64_t g)
                         LIGHTER_AMX { room.template add<false>(room.dots[g % 2][0], x, groups, g); };
    for (int64_t g = 0; g < groups; ++g) {
      int64_t one = 1;
      constexpr int64_t lines = 2 * Room::kRows;
      prefetch_lines(ahead.take_steps(lines, one, w + g * 128), lines);
      const int8_t* const tile = x.tiles + 2 * g * tile_bytes;
      const uint8_t* const from = w + g * 128;
      auto* const dots = room.dots[g % 2][0];
      _tile_loadd(4, tile, x_stride);
      _tile_loadd(5, tile + tile_bytes, x_stride);
      LIGHTER_FOR_BLOCKS(LIGHTER_BEGIN, from)
      LIGHTER_FOR_BLOCKS(LIGHTER_END, from + 64)
      LIGHTER_FOR_BLOCKS(LIGHTER_STORE, dots)
      if (g > 0) add(g - 1);
    }
    LIGHTER_STORES_DONE;
    add(groups - 1);
  }
};

// The nibbles of two groups of each row as bytes, a group to a tile.
template <int rows>
LIGHTER_AMX inline void unpack(const uint8_t* from, int64_t row_bytes, uint8_t (&to)[2][rows * 64]) {
  const __m512i nibble = _mm512_set1_epi8(15);
#pragma GCC unroll 4
  for (int64_t r = 0; r < rows; ++r) {
    const __m512i both = _mm512_loadu_si512(from + r * row_bytes);
    const __m512i low = _mm512_and_si512(both, nibble);
    const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
    _mm512_store_si512(to[0] + r * 64, _mm512_shuffle_i64x2(low, high, 0x44));
    _mm512_store_si512(to[1] + r * 64, _mm512_shuffle_i64x2(low, high, 0xEE));
  }
}

// A group: weights and activations are numbers of tiles, the second one's is loaded.
#define LIGHTER_MULTIPLY(block, weights, from, activations) \
  _tile_zero(block);                                        \
  _tile_loadd(weights, (from) + (block)*kTileBytes, 64);    \
  _tile_dpbusd(block, weights, activations)

// A step has a pair of groups.
template <int blocks, template <int, int64_t, int> typename Rooms>
struct Int4Blocks {
  struct Room : Rooms<blocks, kMaxGroups4, 2> {
    alignas(64) uint8_t weights[2][2][blocks * kTileBytes];  // of a step and the next
  };

  LIGHTER_AMX static void run(const Matrix& matrix, int64_t row, int64_t groups, const TileTokens& x,
                              Room& room, PrefetchStream& ahead) {
    const uint8_t* const w = matrix.values + row * matrix.row_bytes;
    const int64_t halves = row * matrix.row_groups, tile_bytes = x.tile_bytes(), x_stride = tile_bytes / 16;
    Room::take(matrix.scales + halves, matrix.row_groups, groups, room.scales);
    Room::take(matrix.minimums + halves, matrix.row_groups, groups, room.minimums);
    const int64_t pairs = (groups + 1) / 2;
    const auto add_pair = [&](int64_t p) LIGHTER_AMX {
      for (int64_t g = 2 * p; g < std::min(groups, 2 * p + 2); ++g) {
        room.template add<true>(room.dots[p % 2][g % 2], x, groups, g);
      }
    };
    unpack<Room::kRows>(w, matrix.row_bytes, room.weights[0]);
    for (int64_t p = 0; p < pairs; ++p) {
      int64_t one = 1;
      prefetch_lines(ahead.take_steps(Room::kRows, one, w + p * 64), Room::kRows);
      if (p + 1 < pairs) unpack<Room::kRows>(w + (p + 1) * 64, matrix.row_bytes, room.weights[(p + 1) % 2]);
      LIGHTER_STORES_DONE;
      const int8_t* const tile = x.tiles + 2 * p * tile_bytes;
      const uint8_t *const first = room.weights[p % 2][0], *const second = room.weights[p % 2][1];
      auto& dots = room.dots[p % 2];
      _tile_loadd(4, tile, x_stride);
      LIGHTER_FOR_BLOCKS(LIGHTER_MULTIPLY, 6, first, 4)
      LIGHTER_FOR_BLOCKS(LIGHTER_STORE, dots[0])
      if (2 * p + 1 < groups) {
        _tile_loadd(5, tile + tile_bytes, x_stride);
        LIGHTER_FOR_BLOCKS(LIGHTER_MULTIPLY, 7, second, 5)
        LIGHTER_FOR_BLOCKS(LIGHTER_STORE, dots[1])
      }
      if (p > 0) add_pair(p - 1);
    }
    LIGHTER_STORES_DONE;
    add_pair(pairs - 1);
  }
};
#undef LIGHTER_FOR_BLOCKS
#undef LIGHTER_STORE
#undef LIGHTER_BEGIN
#undef LIGHTER_END
#undef LIGHTER_MULTIPLY

template <typename Blocks>
LIGHTER_AMX void run_blocks(const Matrix& matrix, int64_t row, const Tokens& x, const TileTokens& tokens,
                            float* result, int64_t stride, PrefetchStream& ahead) {
  typename Blocks::Room room;
  Blocks::run(matrix, row, x.rows.groups(), tokens, room, ahead);
  room.write(x.count, result, stride);
}

template <template <int, template <int, int64_t, int> typename> typename Blocks,
          template <int, int64_t, int> typename Rooms>
LIGHTER_AMX void multiply(const Matrix& matrix, const Tokens& x, const TileTokens& tokens, int64_t first_row,
                          int64_t count, float* result, int64_t stride, PrefetchStream& ahead) {
  configure(tokens.columns);
  int64_t r = 0;
  for (; r + kBlocks * kRowBlock <= count; r += kBlocks * kRowBlock) {
    run_blocks<Blocks<kBlocks, Rooms>>(matrix, first_row + r, x, tokens, result + r, stride, ahead);
  }
  for (; r < count; r += kRowBlock) {
    run_blocks<Blocks<1, Rooms>>(matrix, first_row + r, x, tokens, result + r, stride, ahead);
  }
  _tile_release();
}

template <bool int8>
LIGHTER_AMX void rows(const Matrix& matrix, const Tokens& x, int64_t first_row, int64_t count, float* result,
                      int64_t stride, PrefetchStream& ahead) {
  const bool few = x.count <= kFew && x.rows.groups() > 1;
  const int64_t blocks = x.count < kAmxTokens ? 0 : count / kRowBlock * kRowBlock;
  if (blocks > 0) {
    const TileTokens& tokens = packed<int8>(x);
    const auto run = [&](auto multiply) {
      multiply(matrix, x, tokens, first_row, blocks, result, stride, ahead);
    };
    if constexpr (int8) {
      run(few ? multiply<Int8Blocks, FewTokens> : multiply<Int8Blocks, ManyTokens>);
    } else {
      run(few ? multiply<Int4Blocks, FewTokens> : multiply<Int4Blocks, ManyTokens>);
    }
  }
  if (blocks == count) return;
  const Kernels others = avx512_kernels();
  (int8 ? others.int8 : others.int4)(matrix, x, first_row + blocks, count - blocks, result + blocks, stride,
                                     ahead);
}

}  // namespace

bool amx_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl; for the process
  static const bool permitted = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
                                syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
}

Kernels amx_kernels() {
  const Kernels one_token = avx512_kernels();
  const auto& [int8, int4] = one_token.rows_at_once;
  constexpr int64_t beside = kBlocks * kRowBlock;
  return {rows<true>, rows<false>, {{int8[0], beside}, {int4[0], beside}}};
}

}  // namespace lighter::cpu_kernels
#endif
