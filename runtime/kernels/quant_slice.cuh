// Building blocks of the quantized-slice kernels, for one warp each: how weights come into shared memory, how
// a stage of them is multiplied, and how a group of activations is quantized. The layout is in quant_slice.h.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "runtime/kernels/quant_slice.h"

namespace lighter::kernels {
constexpr int row_block = 8;  // rows of one matrix that lie together in a stage; a stage has two blocks
constexpr int stage_q_bytes = 2048;  // 16 rows x 128 bytes

template <Encoding E>
struct Traits;
template <>
struct Traits<Encoding::int8> {
  static constexpr int group = 128, chunk_values = 128, chunk_groups = 1, team_warps = 8, scale_bytes = 64;
};
template <>
struct Traits<Encoding::int4> {
  static constexpr int group = 64, chunk_values = 256, chunk_groups = 4, team_warps = 4, scale_bytes = 256;
};

// The slices' addresses: from the launch, or from device memory at run time.
struct Slices {
  const std::byte* inline_[max_slices];
  const std::byte* const* table;
  int count;

  __device__ const std::byte* operator[](int i) const { return table != nullptr ? table[i] : inline_[i]; }
};

struct Geometry {
  int hidden, width, tokens;
};

// 8 consecutive rows of a matrix: q, scales and minima of the first.
struct RowBlock {
  const std::byte *q, *scale, *minimum;
};

template <Encoding E>
__host__ __device__ int64_t row_bytes(int64_t length) {
  return E == Encoding::int8 ? length : length / 2;
}

// matrix: 0 gate, 1 up, 2 down; length: of its rows.
template <Encoding E>
__device__ RowBlock rows_of(const std::byte* slice, const Geometry& g, int matrix, int row, int length) {
  const int64_t elements = static_cast<int64_t>(g.hidden) * g.width;
  const int64_t q_bytes = row_bytes<E>(elements);
  const int64_t scale_bytes = elements / Traits<E>::group * 2;
  const int64_t scale_row = static_cast<int64_t>(row) * (length / Traits<E>::group) * 2;
  const std::byte* scales = slice + 3 * q_bytes + matrix * scale_bytes + scale_row;
  return {slice + matrix * q_bytes + row * row_bytes<E>(length), scales, scales + 3 * scale_bytes};
}

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ inline void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

__device__ inline void copy4(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int Pending>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void team_barrier(int team, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "r"(threads) : "memory");
}

// Which of a row's eight 16-byte pieces of 128 bytes trade places, so that a warp's reads meet no bank twice.
template <Encoding E>
__device__ int swizzle(int row) {
  return E == Encoding::int8 ? (row & 1) << 2 : (row & 3) << 1;
}

// One warp: chunk number `chunk` (128 bytes) of 16 rows into a stage, with its scales. A stage holds
// [16][128] q, then for int8 [16] the 4 bytes around the scale, for int4 [16][4] scales and [16][4] minima.
template <Encoding E>
__device__ void load_weights(std::byte* stage, const RowBlock& top, const RowBlock& bottom, int length,
                             int chunk, int lane) {
  const int bytes = static_cast<int>(row_bytes<E>(length));
  const int groups = length / Traits<E>::group;
  const int piece = lane % 8;
  const int at = chunk * 128 + piece * 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 8 + 4 * i;
    const std::byte* from = (i < 2 ? top.q : bottom.q) + static_cast<int64_t>(row % row_block) * bytes + at;
    std::byte* to = stage + row * 128 + ((piece ^ swizzle<E>(row)) << 4);
    if (E == Encoding::int8 || at < bytes) copy16(to, from);
  }
  std::byte* scales = stage + stage_q_bytes;
  if constexpr (E == Encoding::int8) {
    const std::byte* base = lane < row_block ? top.scale : bottom.scale;
    if (lane < 16) copy4(scales + lane * 4, base + ((((lane % row_block) * groups + chunk) * 2) & ~3));
  } else {
    const int row = lane / 2;
    const int group = chunk * 4 + lane % 2 * 2;
    const bool in_top = row < row_block;
    const int offset = ((row % row_block) * groups + group) * 2;
    if (group < groups) {
      copy4(scales + lane * 4, (in_top ? top.scale : bottom.scale) + offset);
      copy4(scales + 128 + lane * 4, (in_top ? top.minimum : bottom.minimum) + offset);
    }
  }
}

__device__ inline void multiply_add(int (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                    uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ inline float half_at(const std::byte* p) {
  return __half2float(*reinterpret_cast<const __half*>(p));
}

// This lane's share of the activations that belong to a chunk.
template <int TokenTiles>
struct ChunkActivations {
  const std::byte*
      rows[TokenTiles];      // at the chunk's start, of token tile * 8 + lane / 4, or of any other one
  int swizzles[TokenTiles];  // where that token is missing: nobody reads its results
  const float* scales;       // [chunk groups][8 * TokenTiles], from this lane's first token
  const float* sums;
};

// The sums of a lane: row lane / 4 (0, 1) and row lane / 4 + 8 (2, 3) for tokens lane % 4 * 2 and + 1.
template <Encoding E, int TokenTiles>
__device__ void multiply_chunk(const std::byte* stage, const ChunkActivations<TokenTiles>& x, int chunk,
                               int groups, int lane, float (&sum)[TokenTiles][4]) {
  const int row = lane / 4, part = lane % 4, mix = swizzle<E>(row);
  const std::byte* top = stage + row * 128;
  const std::byte* bottom = top + row_block * 128;
  const std::byte* scales = stage + stage_q_bytes;
  // Any order along k will do, as long as both operands have the same one: lane `part` takes 16 (int8) or 8
  // (int4) consecutive bytes rather than the 4 + 4 of the instruction's own order.
  if constexpr (E == Encoding::int8) {
    const int odd = (row * groups + chunk) % 2 * 2;
    const float top_scale = half_at(scales + row * 4 + odd);
    const float bottom_scale = half_at(scales + (row + row_block) * 4 + odd);
    int dot[TokenTiles][2][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int piece = half * 4 + part;
      const uint4 a = *reinterpret_cast<const uint4*>(top + ((piece ^ mix) << 4));
      const uint4 b = *reinterpret_cast<const uint4*>(bottom + ((piece ^ mix) << 4));
#pragma unroll
      for (int t = 0; t < TokenTiles; ++t) {
        const uint4 v = *reinterpret_cast<const uint4*>(x.rows[t] + ((piece ^ x.swizzles[t]) << 4));
        multiply_add(dot[t][half], a.x, b.x, a.y, b.y, v.x, v.y);
        multiply_add(dot[t][half], a.z, b.z, a.w, b.w, v.z, v.w);
      }
    }
#pragma unroll
    for (int t = 0; t < TokenTiles; ++t) {
      const float2 scale = *reinterpret_cast<const float2*>(x.scales + t * 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float both = __fmul_rn(i < 2 ? top_scale : bottom_scale, i % 2 == 0 ? scale.x : scale.y);
        sum[t][i] = __fmaf_rn(both, static_cast<float>(dot[t][0][i] + dot[t][1][i]), sum[t][i]);
      }
    }
  } else {
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      if (chunk * 4 + g >= groups) break;
      const int piece = g * 2 + part / 2, inner = part % 2 * 8;
      const uint2 a = *reinterpret_cast<const uint2*>(top + ((piece ^ mix) << 4) + inner);
      const uint2 b = *reinterpret_cast<const uint2*>(bottom + ((piece ^ mix) << 4) + inner);
      const float top_scale = half_at(scales + row * 8 + g * 2);
      const float bottom_scale = half_at(scales + (row + row_block) * 8 + g * 2);
      const float top_minimum = half_at(scales + 128 + row * 8 + g * 2);
      const float bottom_minimum = half_at(scales + 128 + (row + row_block) * 8 + g * 2);
      constexpr uint32_t low = 0x0f0f0f0f;
#pragma unroll
      for (int t = 0; t < TokenTiles; ++t) {
        const int x_piece = g * 4 + part / 2;
        const uint2 v = *reinterpret_cast<const uint2*>(x.rows[t] + ((x_piece ^ x.swizzles[t]) << 4) + inner);
        const uint2 w =
            *reinterpret_cast<const uint2*>(x.rows[t] + (((x_piece + 2) ^ x.swizzles[t]) << 4) + inner);
        int dot[4] = {};
        multiply_add(dot, a.x & low, b.x & low, a.y & low, b.y & low, v.x, v.y);
        multiply_add(dot, a.x >> 4 & low, b.x >> 4 & low, a.y >> 4 & low, b.y >> 4 & low, w.x, w.y);
        const float2 scale = *reinterpret_cast<const float2*>(x.scales + (g * TokenTiles + t) * 8);
        const float2 total = *reinterpret_cast<const float2*>(x.sums + (g * TokenTiles + t) * 8);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float both = __fmul_rn(i < 2 ? top_scale : bottom_scale, i % 2 == 0 ? scale.x : scale.y);
          sum[t][i] = __fmaf_rn(both, static_cast<float>(dot[i]), sum[t][i]);
          sum[t][i] =
              __fmaf_rn(i < 2 ? top_minimum : bottom_minimum, i % 2 == 0 ? total.x : total.y, sum[t][i]);
        }
      }
    }
  }
}

template <int TokenTiles>
__device__ void store_partial(float* partial, const float (&sum)[TokenTiles][4], int lane) {
#pragma unroll
  for (int t = 0; t < TokenTiles; ++t) {
    float* to = partial + lane / 4 * 8 * TokenTiles + t * 8 + lane % 4 * 2;
    *reinterpret_cast<float2*>(to) = make_float2(sum[t][0], sum[t][1]);
    *reinterpret_cast<float2*>(to + row_block * 8 * TokenTiles) = make_float2(sum[t][2], sum[t][3]);
  }
}

__device__ inline float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// One warp quantizes one group; each lane holds N consecutive values of it.
template <Encoding E, int N>
__device__ void quantize_group(const float (&v)[N], int lane, int8_t* q, float* scale, float* sum) {
  float most = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) most = max_or_nan(most, fabsf(v[i]));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) most = max_or_nan(most, __shfl_xor_sync(~0u, most, step));
  const float unit = __fdiv_rn(most, 127.0f);
  int total = 0;
  uint32_t packed = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    // A unit that is denormal may be rounded far from most / 127, hence the clamp.
    const int value = unit == 0 ? 0 : max(-127, min(127, __float2int_rn(__fdiv_rn(v[i], unit))));
    total += value;
    packed |= (static_cast<uint32_t>(value) & 0xff) << (8 * i);
  }
  if constexpr (N == 4) reinterpret_cast<uint32_t*>(q)[lane] = packed;
  if constexpr (N == 2) reinterpret_cast<uint16_t*>(q)[lane] = static_cast<uint16_t>(packed);
  if (lane == 0) *scale = unit;
  if constexpr (E == Encoding::int4) {
    total = __reduce_add_sync(~0u, total);
    if (lane == 0) *sum = __fmul_rn(unit, static_cast<float>(total));
  }
}

}  // namespace lighter::kernels
