// Warps stream 16 rows x 128 bytes of weights a stage through their own cp.async ring in shared memory, and
// multiply with the int8 tensor cores (m16n8k32: 16 weight rows x 8 tokens), which are exact and far faster
// than the memory for any number of tokens up to 16.
//
// gate_up: a team of warps owns 8 gate rows and the same 8 up rows and splits them along k. The last team
// that finishes a quantization group of the hidden values quantizes it. down: a block owns 16 output rows,
// its warps take the slices in turn, and the partial results are added in the order of the slices. down
// starts to read its weights while gate_up still runs (programmatic dependent launch).
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "runtime/kernels/quant_slice.cuh"

namespace lighter::kernels {

constexpr int gate_up_warps = 16;
constexpr int down_warps = 8;
__host__ __device__ constexpr int gate_up_stages(int token_tiles) {
  return token_tiles == 1 ? 4 : 3;
}
constexpr int down_stages = 3;

template <Encoding E, typename T>
__global__ void __launch_bounds__(256)
    quantize_kernel(const T* x, int64_t groups, int8_t* q, float* scales, float* sums) {
  wait_for_previous_kernel();
  allow_next_kernel();
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
  unsigned* counters;    // [count, width / group]: finished row blocks; zero between calls
};

// One warp: h for the team's 8 rows from the partial results, and the group's quantization if it is the last.
template <Encoding E, int TokenTiles>
__device__ void finish_rows(const float* partials, const Geometry& g, const HiddenValues& h, int slice,
                            int row0, int lane) {
  constexpr int columns = 8 * TokenTiles, group = Traits<E>::group, n = group / 32;
  for (int i = lane; i < row_block * g.tokens; i += 32) {
    const int row = i % row_block, token = i / row_block;
    float gate = 0, up = 0;
#pragma unroll
    for (int w = 0; w < Traits<E>::team_warps; ++w) {
      gate = __fadd_rn(gate, partials[(w * 16 + row) * columns + token]);
      up = __fadd_rn(up, partials[(w * 16 + row_block + row) * columns + token]);
    }
    const float silu = __fdiv_rn(gate, __fadd_rn(1.0f, expf(-gate)));
    h.values[(static_cast<int64_t>(slice) * g.tokens + token) * g.width + row0 + row] = __fmul_rn(silu, up);
  }
  __syncwarp();
  const int groups = g.width / group, at = row0 / group;
  unsigned before = 0;
  if (lane == 0) {
    __threadfence();
    before = atomicInc(&h.counters[slice * groups + at], group / row_block - 1);
    __threadfence();
  }
  before = __shfl_sync(~0u, before, 0);
  __syncwarp();
  if (before != group / row_block - 1) return;
#pragma unroll 4
  for (int token = 0; token < g.tokens; ++token) {
    const int64_t row = static_cast<int64_t>(slice) * g.tokens + token;
    float v[n];
#pragma unroll
    for (int i = 0; i < n; ++i) v[i] = __ldcg(h.values + row * g.width + at * group + lane * n + i);
    quantize_group<E>(v, lane, h.q + row * g.width + at * group, h.scales + row * groups + at,
                      h.sums + row * groups + at);
  }
}

// Shared memory: weight stages of 16 warps | x q [tokens][hidden] | x scales, sums [groups][8 * TokenTiles] |
// partials of 16 warps.
template <Encoding E>
int64_t gate_up_shared_bytes(int64_t hidden, int tokens) {
  const int64_t tiles = tokens > 8 ? 2 : 1;
  const int64_t stages =
      gate_up_warps * gate_up_stages(static_cast<int>(tiles)) * (stage_q_bytes + Traits<E>::scale_bytes);
  const int64_t scales = hidden / Traits<E>::group * tiles * 8 * 4 * (E == Encoding::int4 ? 2 : 1);
  return stages + tokens * hidden + scales + gate_up_warps * 16 * 8 * tiles * 4;
}

template <Encoding E, int TokenTiles>
__global__ void __launch_bounds__(gate_up_warps * 32, 1)
    gate_up_kernel(const __grid_constant__ Slices slices, Geometry g, QuantizedActivations x,
                   HiddenValues h) {
  using T = Traits<E>;
  constexpr int stages = gate_up_stages(TokenTiles), stage_bytes = stage_q_bytes + T::scale_bytes;
  constexpr int columns = 8 * TokenTiles, teams = gate_up_warps / T::team_warps;
  extern __shared__ __align__(128) std::byte shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int team = warp / T::team_warps, member = warp % T::team_warps;
  const int groups = g.hidden / T::group;
  std::byte* const ring = shared + warp * stages * stage_bytes;
  std::byte* const x_q = shared + gate_up_warps * stages * stage_bytes;
  float* const x_scales = reinterpret_cast<float*>(x_q + static_cast<int64_t>(g.tokens) * g.hidden);
  float* const x_sums = x_scales + groups * columns;
  float* const partials =
      (E == Encoding::int4 ? x_sums : x_scales) + groups * columns + team * T::team_warps * 16 * columns;

  wait_for_previous_kernel();
  allow_next_kernel();

  // The activations' copies belong to the ring's first group.
  for (int i = threadIdx.x; i < g.tokens * (g.hidden / 16); i += blockDim.x) {
    const int token = i / (g.hidden / 16), piece = i % (g.hidden / 16);
    copy16(x_q + static_cast<int64_t>(token) * g.hidden + ((piece ^ swizzle<E>(token)) << 4),
           x.q + static_cast<int64_t>(i) * 16);
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

  for (int i = threadIdx.x; i < groups * columns; i += blockDim.x) {
    const int group = i / columns, token = i % columns;
    const bool real = token < g.tokens;
    x_scales[i] = real ? x.scales[token * groups + group] : 0;
    if constexpr (E == Encoding::int4) x_sums[i] = real ? x.sums[token * groups + group] : 0;
  }
  wait_for_copies<stages - 2>();
  __syncthreads();

  ChunkActivations<TokenTiles> chunk_x;
  const std::byte* x_rows[TokenTiles];
#pragma unroll
  for (int t = 0; t < TokenTiles; ++t) {
    const int token = min(t * 8 + lane / 4, g.tokens - 1);
    x_rows[t] = x_q + static_cast<int64_t>(token) * g.hidden;
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
    const int slice = tile / blocks_per_slice;
    if (member == turn && slices[slice] != nullptr) {
      finish_rows<E, TokenTiles>(partials, g, h, slice, tile % blocks_per_slice * row_block, lane);
    }
    turn = turn + 1 == T::team_warps ? 0 : turn + 1;
  }
}

// A stage holds the weights' stage | x q [tokens][chunk values] | x scales, sums [chunk groups][8 *
// TokenTiles].
template <Encoding E>
__host__ __device__ constexpr int down_stage_bytes(int tokens, int token_tiles) {
  using T = Traits<E>;
  return stage_q_bytes + T::scale_bytes + tokens * T::chunk_values +
         T::chunk_groups * 8 * token_tiles * 4 * (E == Encoding::int4 ? 2 : 1);
}

template <Encoding E>
int64_t down_shared_bytes(int tokens) {
  const int tiles = tokens > 8 ? 2 : 1;
  return down_warps * (down_stages * down_stage_bytes<E>(tokens, tiles) + 16 * 8 * tiles * 4);
}

// One warp: the activations of a chunk of one slice into a stage.
template <Encoding E, int TokenTiles>
__device__ void load_activations(std::byte* stage, const Geometry& g, const HiddenValues& h, int slice,
                                 int chunk, int lane) {
  using T = Traits<E>;
  constexpr int pieces = T::chunk_values / 16, columns = 8 * TokenTiles;
  const int64_t row0 = static_cast<int64_t>(slice) * g.tokens;
  std::byte* const q = stage + stage_q_bytes + T::scale_bytes;
  for (int i = lane; i < g.tokens * pieces; i += 32) {
    const int token = i / pieces, piece = i % pieces;
    copy16(q + token * T::chunk_values + ((piece ^ swizzle<E>(token)) << 4),
           h.q + (row0 + token) * g.width + chunk * T::chunk_values + piece * 16);
  }
  float* const scales = reinterpret_cast<float*>(q + g.tokens * T::chunk_values);
  const int groups = g.width / T::group;
  for (int i = lane; i < g.tokens * T::chunk_groups; i += 32) {
    const int token = i / T::chunk_groups, group = i % T::chunk_groups;
    const int64_t from = (row0 + token) * groups + chunk * T::chunk_groups + group;
    copy4(scales + group * columns + token, h.scales + from);
    if constexpr (E == Encoding::int4)
      copy4(scales + (T::chunk_groups + group) * columns + token, h.sums + from);
  }
}

template <Encoding E, int TokenTiles>
__global__ void __launch_bounds__(down_warps * 32, TokenTiles == 1 ? 3 : 2)
    down_kernel(const __grid_constant__ Slices slices, Geometry g, HiddenValues h, float* total) {
  using T = Traits<E>;
  constexpr int columns = 8 * TokenTiles, partial_values = 16 * columns;
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ bool present[down_warps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int stage_bytes = down_stage_bytes<E>(g.tokens, TokenTiles);
  const int groups = g.width / T::group, chunks = g.width / T::chunk_values;
  const int row0 = blockIdx.x * 16;
  std::byte* const ring = shared + warp * down_stages * stage_bytes;
  float* const partials = reinterpret_cast<float*>(shared + down_warps * down_stages * stage_bytes);

  struct Position {
    int slice, chunk, slot;
  };
  auto advance = [&](Position& p) {
    p.slot = p.slot + 1 == down_stages ? 0 : p.slot + 1;
    if (++p.chunk < chunks) return;
    p.chunk = 0;
    p.slice += down_warps;
  };
  auto load_slice = [&](const Position& p) {
    const std::byte* slice = p.slice < slices.count ? slices[p.slice] : nullptr;
    if (slice == nullptr) return;
    load_weights<E>(ring + p.slot * stage_bytes, rows_of<E>(slice, g, 2, row0, g.width),
                    rows_of<E>(slice, g, 2, row0 + row_block, g.width), g.width, p.chunk, lane);
  };
  auto load_hidden = [&](const Position& p) {
    if (p.slice < slices.count) {
      load_activations<E, TokenTiles>(ring + p.slot * stage_bytes, g, h, p.slice, p.chunk, lane);
    }
    commit_copies();
  };

  // gate_up has read these slices, so they are complete: only the hidden values have to be waited for.
  Position ahead{warp, 0, 0};
  for (int i = 0; i < down_stages - 1; ++i, advance(ahead)) load_slice(ahead);
  wait_for_previous_kernel();
  allow_next_kernel();
  ahead = {warp, 0, 0};
  for (int i = 0; i < down_stages - 1; ++i, advance(ahead)) load_hidden(ahead);

  // Thread i adds up row i % 16 of token i / 16.
  const int row = threadIdx.x % 16, token = threadIdx.x / 16;
  float* const result = total + static_cast<int64_t>(token) * g.hidden + row0 + row;
  float sum = token < g.tokens ? *result : 0;

  Position now{warp, 0, 0};
  for (int round = 0; round < slices.count; round += down_warps) {
    const bool mine = round + warp < slices.count;
    float partial[TokenTiles][4] = {};
    for (int chunk = 0; mine && chunk < chunks; ++chunk, advance(now)) {
      wait_for_copies<down_stages - 2>();
      __syncwarp();
      load_slice(ahead);
      load_hidden(ahead);
      advance(ahead);
      const std::byte* const stage = ring + now.slot * stage_bytes;
      const std::byte* const q = stage + stage_q_bytes + T::scale_bytes;
      ChunkActivations<TokenTiles> x;
      x.scales = reinterpret_cast<const float*>(q + g.tokens * T::chunk_values) + lane % 4 * 2;
      x.sums = x.scales + T::chunk_groups * columns;
#pragma unroll
      for (int t = 0; t < TokenTiles; ++t) {
        const int of = min(t * 8 + lane / 4, g.tokens - 1);
        x.rows[t] = q + of * T::chunk_values;
        x.swizzles[t] = swizzle<E>(of);
      }
      multiply_chunk<E, TokenTiles>(stage, x, chunk, groups, lane, partial);
    }
    __syncthreads();  // the last round's partial results have been read
    store_partial<TokenTiles>(partials + warp * partial_values, partial, lane);
    if (lane == 0) present[warp] = mine && slices[round + warp] != nullptr;
    __syncthreads();
    if (token >= g.tokens) continue;
#pragma unroll
    for (int w = 0; w < down_warps; ++w) {
      if (present[w]) sum = __fadd_rn(sum, partials[w * partial_values + row * columns + token]);
    }
  }
  if (token < g.tokens) *result = sum;
}

// A thread turns 16 bytes of q into 16 (int8) or 2 x 16 (int4) values; blockIdx.y: gate, up, down.
template <Encoding E>
__global__ void __launch_bounds__(256)
    dequantize_kernel(const std::byte* slice, Geometry g, __nv_bfloat16* gate_up, __nv_bfloat16* down) {
  const int64_t elements = static_cast<int64_t>(g.hidden) * g.width;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index * 16 >= row_bytes<E>(elements)) return;
  const int matrix = blockIdx.y, length = matrix == 2 ? g.width : g.hidden;
  const RowBlock all = rows_of<E>(slice, g, matrix, 0, length);
  __nv_bfloat16* const out = matrix == 2 ? down : gate_up + matrix * elements;
  const uint4 q = reinterpret_cast<const uint4*>(all.q)[index];
  const uint32_t words[4] = {q.x, q.y, q.z, q.w};
  constexpr int runs = E == Encoding::int8 ? 1 : 2;
  const int64_t group = E == Encoding::int8 ? index / 8 : index / 2;
  const int64_t start = E == Encoding::int8 ? index * 16 : group * 64 + index % 2 * 16;
  const float scale = half_at(all.scale + group * 2);
  const float minimum = E == Encoding::int8 ? 0 : half_at(all.minimum + group * 2);
#pragma unroll
  for (int run = 0; run < runs; ++run) {
    __align__(16) __nv_bfloat16 values[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint32_t byte = words[i / 4] >> (i % 4 * 8) & 0xff;
      const int value =
          E == Encoding::int8 ? static_cast<int8_t>(byte) : static_cast<int>(byte >> run * 4 & 15);
      values[i] = __float2bfloat16_rn(__fmaf_rn(scale, static_cast<float>(value), minimum));
    }
    uint4* const to = reinterpret_cast<uint4*>(out + start + run * 32);
    to[0] = reinterpret_cast<const uint4*>(values)[0];
    to[1] = reinterpret_cast<const uint4*>(values)[1];
  }
}

}  // namespace lighter::kernels
