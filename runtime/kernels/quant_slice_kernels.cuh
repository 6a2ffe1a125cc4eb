// Persistent blocks of 16 warps, one to a multiprocessor. The activations stay in shared memory; each warp
// streams weights, 16 rows x 128 bytes a stage, through its own ring in shared memory, and multiplies with
// the int8 tensor cores (m16n8k32: 16 weight rows x 8 tokens), which are exact and far faster than the memory
// for any number of tokens up to 16.
//
// gate_up: a team of warps owns 8 gate rows and the same 8 up rows and splits them along k.
// down: a team owns 16 output rows, its warps take the slices in turn, and the finished results of the slices
// are added in the order of the slices. down starts to read its weights while the kernels before it still run
// (programmatic dependent launch).
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "runtime/kernels/quant_slice.cuh"

namespace lighter::kernels {

constexpr int block_warps = 16;
__host__ __device__ constexpr int ring_stages(int token_tiles) {
  return token_tiles == 1 ? 4 : 3;
}

template <Encoding E, typename T>
__global__ void __launch_bounds__(256)
    quantize_kernel(const T* x, int64_t groups, int8_t* q, float* scales, float* sums) {
  allow_next_kernel();
  wait_for_previous_kernel();
  constexpr int group = Traits<E>::group, n = group / 32;
  const int lane = threadIdx.x % 32;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  if (index >= groups) return;
  float v[n];
#pragma unroll
  for (int i = 0; i < n; ++i) v[i] = static_cast<float>(x[index * group + lane * n + i]);
  quantize_group<E>(v, lane, q + index * group, scales + index, sums + index);
}

struct HiddenValues {
  float* values;         // [count, tokens, width]
  int8_t* q;             // [count, tokens, width]
  float *scales, *sums;  // [count, tokens, width / group]
};

// Shared memory of both kernels: weight stages of the warps | x q | x scales, sums | partial results of the
// warps.
template <Encoding E>
int64_t shared_bytes(int64_t x_values, int tokens) {
  const int tiles = tokens > 8 ? 2 : 1;
  const int64_t stages = block_warps * ring_stages(tiles) * (stage_q_bytes + Traits<E>::scale_bytes);
  const int64_t scales = x_values / Traits<E>::group * tiles * 8 * 4 * (E == Encoding::int4 ? 2 : 1);
  return stages + tokens * x_values + scales + block_warps * 16 * 8 * tiles * 4;
}

template <Encoding E, int TokenTiles>
__global__ void __launch_bounds__(block_warps * 32, 1)
    gate_up_kernel(const __grid_constant__ Slices slices, Geometry g, QuantizedActivations x,
                   HiddenValues h) {
  using T = Traits<E>;
  constexpr int stages = ring_stages(TokenTiles), stage_bytes = stage_q_bytes + T::scale_bytes;
  constexpr int columns = 8 * TokenTiles, teams = block_warps / T::team_warps;
  extern __shared__ __align__(128) std::byte shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int team = warp / T::team_warps, member = warp % T::team_warps;
  const int groups = g.hidden / T::group;
  std::byte* const ring = shared + warp * stages * stage_bytes;
  std::byte* const x_q = shared + block_warps * stages * stage_bytes;
  float* const x_scales = reinterpret_cast<float*>(x_q + g.tokens * g.hidden);
  float* const x_sums = x_scales + groups * columns;
  float* const partials =
      (E == Encoding::int4 ? x_sums : x_scales) + groups * columns + team * T::team_warps * 16 * columns;

  wait_for_previous_kernel();
  allow_next_kernel();

  // The copies of the activations belong to the ring's first group.
  const int pieces = g.hidden / 16;
  for (int i = threadIdx.x; i < g.tokens * pieces; i += blockDim.x) {
    const int token = i / pieces, piece = i % pieces;
    copy16(x_q + token * g.hidden + ((piece ^ swizzle<E>(token)) << 4), x.q + i * 16);
  }
  for (int i = threadIdx.x; i < g.tokens * groups; i += blockDim.x) {
    const int to = i % groups * columns + i / groups;
    copy4(x_scales + to, x.scales + i);
    if constexpr (E == Encoding::int4) copy4(x_sums + to, x.sums + i);
  }
  const int blocks_per_slice = g.width / row_block;
  const int tiles = slices.count * blocks_per_slice;
  const int first = team * gridDim.x + blockIdx.x, stride = gridDim.x * teams;
  const int chunks = (g.hidden + T::chunk_values - 1) / T::chunk_values;

  int ahead_tile = first, ahead_chunk = member, ahead_slot = 0;
  RowBlock ahead_gate{}, ahead_up{};
  auto locate = [&] {
    if (ahead_tile >= tiles) return;
    const std::byte* slice = slices[ahead_tile / blocks_per_slice];
    const int row = ahead_tile % blocks_per_slice * row_block;
    ahead_gate = rows_of<E>(slice, g, 0, row, g.hidden);
    ahead_up = rows_of<E>(slice, g, 1, row, g.hidden);
    if (slice == nullptr) ahead_gate.q = nullptr;
  };
  auto load_ahead = [&] {
    if (ahead_tile < tiles && ahead_chunk < chunks) {
      if (ahead_gate.q != nullptr) {
        load_weights<E>(ring + ahead_slot * stage_bytes, ahead_gate, ahead_up, g.hidden, ahead_chunk, lane);
      }
      ahead_slot = ahead_slot + 1 == stages ? 0 : ahead_slot + 1;
      ahead_chunk += T::team_warps;
      if (ahead_chunk >= chunks) {
        ahead_chunk = member;
        ahead_tile += stride;
        locate();
      }
    }
    commit_copies();
  };
  locate();
#pragma unroll
  for (int i = 0; i < stages - 1; ++i) load_ahead();

  wait_for_copies<stages - 2>();
  __syncthreads();

  ChunkActivations<TokenTiles> chunk_x;
  const std::byte* x_rows[TokenTiles];
#pragma unroll
  for (int t = 0; t < TokenTiles; ++t) {
    const int token = min(t * 8 + lane / 4, g.tokens - 1);
    x_rows[t] = x_q + token * g.hidden;
    chunk_x.swizzles[t] = swizzle<E>(token);
  }
  int slot = 0, turn = 0;
  for (int tile = first; tile < tiles; tile += stride) {
    float sum[TokenTiles][4] = {};
    for (int chunk = member; chunk < chunks; chunk += T::team_warps) {
      wait_for_copies<stages - 2>();
      __syncwarp();
      load_ahead();
#pragma unroll
      for (int t = 0; t < TokenTiles; ++t) chunk_x.rows[t] = x_rows[t] + chunk * T::chunk_values;
      chunk_x.scales = x_scales + chunk * T::chunk_groups * columns + lane % 4 * 2;
      chunk_x.sums = x_sums + chunk * T::chunk_groups * columns + lane % 4 * 2;
      multiply_chunk<E, TokenTiles>(ring + slot * stage_bytes, chunk_x, chunk, groups, lane, sum);
      slot = slot + 1 == stages ? 0 : slot + 1;
    }
    team_barrier(team, T::team_warps * 32);  // the last tile's partial results have been read
    store_partial<TokenTiles>(partials + member * 16 * columns, sum, lane);
    team_barrier(team, T::team_warps * 32);
    // The first warps from `turn` on, one thread for each row and token.
    const int after = member >= turn ? member - turn : member - turn + T::team_warps;
    turn = turn + 1 == T::team_warps ? 0 : turn + 1;
    const int row = lane % row_block, token = after * 4 + lane / row_block;
    if (token >= g.tokens) continue;
    float gate = 0, up = 0;
#pragma unroll
    for (int w = 0; w < T::team_warps; ++w) {
      gate = __fadd_rn(gate, partials[(w * 16 + row) * columns + token]);
      up = __fadd_rn(up, partials[(w * 16 + row_block + row) * columns + token]);
    }
    const float silu = __fdiv_rn(gate, __fadd_rn(1.0f, expf(-gate)));
    const int slice = tile / blocks_per_slice, in_slice = tile % blocks_per_slice * row_block + row;
    h.values[(slice * g.tokens + token) * static_cast<int64_t>(g.width) + in_slice] = __fmul_rn(silu, up);
  }
}

// Adds the slices from `first` on. team_warps: 8 or 16.
template <Encoding E, int TokenTiles>
__global__ void __launch_bounds__(block_warps * 32, 1)
    down_kernel(const __grid_constant__ Slices slices, int first, int count, int team_warps, Geometry g,
                HiddenValues h, float* total) {
  using T = Traits<E>;
  constexpr int stages = ring_stages(TokenTiles), stage_bytes = stage_q_bytes + T::scale_bytes;
  constexpr int columns = 8 * TokenTiles, partial_values = 16 * columns;
  extern __shared__ __align__(128) std::byte shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int team = warp / team_warps, member = warp % team_warps,
            team_thread = threadIdx.x % (team_warps * 32);
  const int groups = g.width / T::group, chunks = g.width / T::chunk_values;
  std::byte* const ring = shared + warp * stages * stage_bytes;
  std::byte* const x_q = shared + block_warps * stages * stage_bytes;  // [count][tokens][width]
  float* const x_scales =
      reinterpret_cast<float*>(x_q + count * g.tokens * g.width);  // [count][groups][columns]
  float* const x_sums = x_scales + count * groups * columns;
  float* const partials = (E == Encoding::int4 ? x_sums : x_scales) + count * groups * columns +
                          team * team_warps * partial_values;

  const int tiles = g.hidden / 16, stride = gridDim.x * (block_warps / team_warps);
  const int first_tile = team * gridDim.x + blockIdx.x;
  struct {
    int tile, slice, chunk, slot;
  } ahead{first_tile, member, 0, 0};
  auto load_ahead = [&] {
    if (ahead.tile >= tiles || ahead.slice >= count) return;
    const std::byte* const slice = slices[first + ahead.slice];
    if (slice != nullptr) {
      const RowBlock top = rows_of<E>(slice, g, 2, ahead.tile * 16, g.width);
      const RowBlock bottom = rows_of<E>(slice, g, 2, ahead.tile * 16 + row_block, g.width);
      load_weights<E>(ring + ahead.slot * stage_bytes, top, bottom, g.width, ahead.chunk, lane);
    }
    ahead.slot = ahead.slot + 1 == stages ? 0 : ahead.slot + 1;
    if (++ahead.chunk < chunks) return;
    ahead.chunk = 0;
    ahead.slice += team_warps;
    if (ahead.slice < count) return;
    ahead.slice = member;
    ahead.tile += stride;
  };

  // gate_up has read these slices, so they are complete: only the hidden values have to be waited for.
#pragma unroll
  for (int i = 0; i < stages - 1; ++i) load_ahead();
  wait_for_previous_kernel();
  allow_next_kernel();
  const int pieces = g.width / 16, rows = count * g.tokens;
  const int8_t* const h_q = h.q + static_cast<int64_t>(first) * g.tokens * g.width;
  for (int i = threadIdx.x; i < rows * pieces; i += blockDim.x) {
    const int row = i / pieces, piece = i % pieces;
    copy16(x_q + row * g.width + ((piece ^ swizzle<E>(row % g.tokens)) << 4), h_q + i * 16);
  }
  for (int i = threadIdx.x; i < rows * groups; i += blockDim.x) {
    const int row = i / groups, to = (row / g.tokens * groups + i % groups) * columns + row % g.tokens;
    copy4(x_scales + to, h.scales + first * g.tokens * groups + i);
    if constexpr (E == Encoding::int4) copy4(x_sums + to, h.sums + first * g.tokens * groups + i);
  }
  commit_copies();
#pragma unroll
  for (int i = 0; i < stages - 2; ++i) commit_copies();
  wait_for_copies<stages - 2>();
  __syncthreads();

  int x_rows[TokenTiles];
  ChunkActivations<TokenTiles> x;
#pragma unroll
  for (int t = 0; t < TokenTiles; ++t) {
    const int token = min(t * 8 + lane / 4, g.tokens - 1);
    x_rows[t] = token * g.width;
    x.swizzles[t] = swizzle<E>(token);
  }
  // A thread adds up row team_thread % 16 of token team_thread / 16.
  const int row = team_thread % 16, token = team_thread / 16;
  const bool adds = token < g.tokens;
  int slot = 0;
  for (int tile = first_tile; tile < tiles; tile += stride) {
    float* const result = total + static_cast<int64_t>(token) * g.hidden + tile * 16 + row;
    float sum = adds ? *result : 0;
    for (int round = 0; round < count; round += team_warps) {
      const int slice = round + member;
      float partial[TokenTiles][4] = {};
      for (int chunk = 0; slice < count && chunk < chunks; ++chunk) {
        wait_for_copies<stages - 2>();
        __syncwarp();
        load_ahead();
        commit_copies();
        const int at = slice * g.tokens * g.width + chunk * T::chunk_values;
#pragma unroll
        for (int t = 0; t < TokenTiles; ++t) x.rows[t] = x_q + at + x_rows[t];
        x.scales = x_scales + (slice * groups + chunk * T::chunk_groups) * columns + lane % 4 * 2;
        x.sums = x_sums + (slice * groups + chunk * T::chunk_groups) * columns + lane % 4 * 2;
        multiply_chunk<E, TokenTiles>(ring + slot * stage_bytes, x, chunk, groups, lane, partial);
        slot = slot + 1 == stages ? 0 : slot + 1;
      }
      team_barrier(team, team_warps * 32);  // the last round's partial results have been read
      store_partial<TokenTiles>(partials + member * partial_values, partial, lane);
      team_barrier(team, team_warps * 32);
      if (!adds) continue;
      const int here = min(team_warps, count - round);
      for (int w = 0; w < here; ++w) {
        const float value = partials[w * partial_values + row * columns + token];
        if (slices[first + round + w] != nullptr) sum = __fadd_rn(sum, value);
      }
    }
    if (adds) *result = sum;
  }
}

// A thread turns 8 bytes of q into 8 (int8) or 2 x 8 (int4) values; blockIdx.y: gate, up, down.
template <Encoding E>
__global__ void __launch_bounds__(256)
    dequantize_kernel(const std::byte* slice, Geometry g, __nv_bfloat16* gate_up, __nv_bfloat16* down) {
  wait_for_previous_kernel();
  allow_next_kernel();
  const int64_t elements = static_cast<int64_t>(g.hidden) * g.width;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index * 8 >= row_bytes<E>(elements)) return;
  const int matrix = blockIdx.y, length = matrix == 2 ? g.width : g.hidden;
  const RowBlock all = rows_of<E>(slice, g, matrix, 0, length);
  __nv_bfloat16* const out = matrix == 2 ? down : gate_up + matrix * elements;
  const uint2 q = reinterpret_cast<const uint2*>(all.q)[index];
  constexpr int runs = E == Encoding::int8 ? 1 : 2;
  const int64_t group = E == Encoding::int8 ? index / 16 : index / 4;
  const int64_t start = E == Encoding::int8 ? index * 8 : group * 64 + index % 4 * 8;
  const float scale = half_at(all.scale + group * 2);
  const float minimum = E == Encoding::int8 ? 0 : half_at(all.minimum + group * 2);
#pragma unroll
  for (int run = 0; run < runs; ++run) {
    __align__(16) __nv_bfloat16 values[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t byte = (i < 4 ? q.x : q.y) >> (i % 4 * 8) & 0xff;
      const int value =
          E == Encoding::int8 ? static_cast<int8_t>(byte) : static_cast<int>(byte >> run * 4 & 15);
      values[i] = __float2bfloat16_rn(__fmaf_rn(scale, static_cast<float>(value), minimum));
    }
    *reinterpret_cast<uint4*>(out + start + run * 32) = *reinterpret_cast<const uint4*>(values);
  }
}

}  // namespace lighter::kernels
