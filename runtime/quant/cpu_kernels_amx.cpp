// Several tokens, up to 16, with AMX: a tile of weights is 16 rows as they lie, one of activations 64 values
// of each token, so that an instruction multiplies 16 rows by all tokens. Products go through memory, since a
// tile has no other way to a vector; a load waits until the store before it has left the processor's store
// buffer, so each step's products are used a step later. One token, or very few, go to AVX-512. Functions
// carry their target, so that this file needs no flags.
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

// What blocks of rows are multiplied with, as fp32: [rows, groups]. And their products with all tokens:
// integers of one step and the one before it, and the sums of all.
template <int blocks, int64_t most_groups, int groups_of_step>
struct BlockRoom {
  static constexpr int kRows = blocks * kRowBlock;
  alignas(64) int32_t dots[2][groups_of_step][kRows][kTokens] = {};
  alignas(64) float sums[kRows][kTokens] = {};
  float scales[kRows * most_groups];
};

// OPERATION(block, ...) for each block: tiles have numbers that are known when this is compiled.
#define LIGHTER_FOR_BLOCKS(OPERATION, ...) \
  OPERATION(0, __VA_ARGS__);               \
  if constexpr (blocks > 1) {              \
    OPERATION(1, __VA_ARGS__);             \
  }
#define LIGHTER_STORE(block, dots) _tile_stored(block, (dots)[(block)*kRowBlock], 64)

// The two halves of a group, of activations in the tiles 4 and 5.
#define LIGHTER_BEGIN(block, from)                             \
  _tile_zero(block);                                           \
  _tile_loadd(6, (from) + (block)*kRowBlock * stride, stride); \
  _tile_dpbssd(block, 6, 4)
#define LIGHTER_END(block, from)                               \
  _tile_loadd(7, (from) + (block)*kRowBlock * stride, stride); \
  _tile_dpbssd(block, 7, 5)

template <int blocks>
struct Int8Blocks {
  using Room = BlockRoom<blocks, kMaxGroups8, 1>;

  LIGHTER_AMX static void run(const Matrix& matrix, int64_t row, int64_t groups, const TileTokens& x,
                              Room& room, PrefetchStream& ahead) {
    const uint8_t* const w = matrix.values + row * matrix.row_bytes;
    const int64_t stride = matrix.row_bytes, tile_bytes = x.tile_bytes(), x_stride = tile_bytes / 16;
    widen(matrix.scales + row * matrix.row_groups, matrix.row_groups, Room::kRows, groups, room.scales);
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
      if (g > 0) add(room, x, groups, g - 1);
    }
    add(room, x, groups, groups - 1);
  }

  LIGHTER_AMX static inline void add(Room& room, const TileTokens& x, int64_t groups, int64_t g) {
    const __m512 token_scales = _mm512_load_ps(x.scales + g * kTokens);
    const float* const scales = room.scales + g;
    const auto* const dots = room.dots[g % 2][0];
#pragma GCC unroll 16
    for (int r = 0; r < Room::kRows; ++r) {
      const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(scales[r * groups]), token_scales);
      const __m512 dot = _mm512_cvtepi32_ps(_mm512_load_si512(dots[r]));
      _mm512_store_ps(room.sums[r], _mm512_fmadd_ps(factor, dot, _mm512_load_ps(room.sums[r])));
    }
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
template <int blocks>
struct Int4Blocks {
  struct Room : BlockRoom<blocks, kMaxGroups4, 2> {
    float minimums[blocks * kRowBlock * kMaxGroups4];
    alignas(64) uint8_t weights[2][2][blocks * kTileBytes];  // of a step and the next
  };

  LIGHTER_AMX static void run(const Matrix& matrix, int64_t row, int64_t groups, const TileTokens& x,
                              Room& room, PrefetchStream& ahead) {
    const uint8_t* const w = matrix.values + row * matrix.row_bytes;
    const int64_t halves = row * matrix.row_groups, tile_bytes = x.tile_bytes(), x_stride = tile_bytes / 16;
    widen(matrix.scales + halves, matrix.row_groups, Room::kRows, groups, room.scales);
    widen(matrix.minimums + halves, matrix.row_groups, Room::kRows, groups, room.minimums);
    const int64_t pairs = (groups + 1) / 2;
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
      if (p > 0) add_pair(room, x, groups, p - 1);
    }
    add_pair(room, x, groups, pairs - 1);
  }

  LIGHTER_AMX static inline void add_pair(Room& room, const TileTokens& x, int64_t groups, int64_t p) {
    for (int64_t g = 2 * p; g < std::min(groups, 2 * p + 2); ++g) {
      const __m512 token_scales = _mm512_load_ps(x.scales + g * kTokens),
                   scaled_sums = _mm512_load_ps(x.sums + g * kTokens);
      const float *const scales = room.scales + g, *const minimums = room.minimums + g;
      const auto* const dots = room.dots[p % 2][g % 2];
#pragma GCC unroll 16
      for (int r = 0; r < Room::kRows; ++r) {
        const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(scales[r * groups]), token_scales);
        const __m512 dot = _mm512_cvtepi32_ps(_mm512_load_si512(dots[r]));
        const __m512 least =
            _mm512_fmadd_ps(_mm512_set1_ps(minimums[r * groups]), scaled_sums, _mm512_load_ps(room.sums[r]));
        _mm512_store_ps(room.sums[r], _mm512_fmadd_ps(factor, dot, least));
      }
    }
  }
};
#undef LIGHTER_FOR_BLOCKS
#undef LIGHTER_STORE
#undef LIGHTER_BEGIN
#undef LIGHTER_END
#undef LIGHTER_MULTIPLY

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

template <typename Blocks>
LIGHTER_AMX void run_blocks(const Matrix& matrix, int64_t row, const Tokens& x, const TileTokens& tokens,
                            float* result, int64_t stride, PrefetchStream& ahead) {
  typename Blocks::Room room;
  Blocks::run(matrix, row, x.rows.groups(), tokens, room, ahead);
  for (int r = 0; r < Blocks::Room::kRows; r += kRowBlock) {
    __m512 sums[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) sums[i] = _mm512_load_ps(room.sums[r + i]);
    transpose(sums);
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) {
      if (t < x.count) _mm512_storeu_ps(result + t * stride + r, sums[t]);
    }
  }
}

template <template <int> typename Blocks>
LIGHTER_AMX void multiply(const Matrix& matrix, const Tokens& x, const TileTokens& tokens, int64_t first_row,
                          int64_t count, float* result, int64_t stride, PrefetchStream& ahead) {
  configure(tokens.columns);
  int64_t r = 0;
  for (; r + kBlocks * kRowBlock <= count; r += kBlocks * kRowBlock) {
    run_blocks<Blocks<kBlocks>>(matrix, first_row + r, x, tokens, result + r, stride, ahead);
  }
  for (; r < count; r += kRowBlock) {
    run_blocks<Blocks<1>>(matrix, first_row + r, x, tokens, result + r, stride, ahead);
  }
  _tile_release();
}

template <bool int8>
LIGHTER_AMX void rows(const Matrix& matrix, const Tokens& x, int64_t first_row, int64_t count, float* result,
                      int64_t stride, PrefetchStream& ahead) {
  const int64_t blocks = x.count <= kFewTokens ? 0 : count / kRowBlock * kRowBlock;
  if (blocks > 0) {
    const TileTokens& tokens = packed<int8>(x);
    if constexpr (int8) {
      multiply<Int8Blocks>(matrix, x, tokens, first_row, blocks, result, stride, ahead);
    } else {
      multiply<Int4Blocks>(matrix, x, tokens, first_row, blocks, result, stride, ahead);
    }
  }
  if (blocks == count) return;
  const Kernels few = avx512_kernels();
  (int8 ? few.int8 : few.int4)(matrix, x, first_row + blocks, count - blocks, result + blocks, stride, ahead);
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
  return {rows<true>,
          rows<false>,
          {{int8[0], int8[1], kBlocks * kRowBlock}, {int4[0], int4[1], kBlocks * kRowBlock}}};
}

}  // namespace lighter::cpu_kernels
#endif
