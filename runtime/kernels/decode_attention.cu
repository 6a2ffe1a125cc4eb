#include <cuda_bf16.h>

#include <algorithm>

#include "runtime/kernels/decode_attention.h"
#include "runtime/kernels/launch.cuh"

namespace lighter::kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMostSplits = 32;
constexpr int kFewestKeys = 16;  // of a split

// A key belongs to head_dim / 8 lanes, each with 8 of its values.
template <int D>
constexpr int kLanes = D / 8;

__device__ inline void unpack8(uint4 v, float (&to)[8]) {
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = __uint_as_float(words[i] << 16);
    to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000);
  }
}

// A lane's part of a rotation.
template <int D>
struct Rotation {
  static constexpr int pairs = D / 64;
  float sine[pairs], cosine[pairs];

  __device__ void set(const DecodeAttention& a, int position, int lane) {
    if (!a.rope) return;
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      sincosf(static_cast<float>(position) * a.inverse_frequencies[lane + i * 32], sine + i, cosine + i);
    }
  }
};

// One warp: a head of D values from qkv into shared memory, rotated and normed.
template <int D>
__device__ void prepare_head(const DecodeAttention& a, const float* from, float* to,
                             const Rotation<D>& rotation, float scale, bool rotate, int lane) {
  float squares = 0, x[Rotation<D>::pairs], y[Rotation<D>::pairs];
  const auto first = [&](int i) { return a.interleaved ? 2 * (lane + i * 32) : lane + i * 32; };
  const int apart = a.interleaved ? 1 : D / 2;
#pragma unroll
  for (int i = 0; i < Rotation<D>::pairs; ++i) {
    x[i] = __ldcg(from + first(i));
    y[i] = __ldcg(from + first(i) + apart);
  }
#pragma unroll
  for (int i = 0; i < Rotation<D>::pairs; ++i) {
    if (rotate && a.rope) {
      const float rotated = x[i] * rotation.cosine[i] - y[i] * rotation.sine[i];
      y[i] = x[i] * rotation.sine[i] + y[i] * rotation.cosine[i];
      x[i] = rotated;
    }
    squares += x[i] * x[i] + y[i] * y[i];
    to[first(i)] = x[i];
    to[first(i) + apart] = y[i];
  }
  for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
  __syncwarp();
  if (rotate && a.qk_norm) scale *= rsqrtf(squares / D + a.eps);
  for (int i = lane; i < D; i += 32) to[i] *= scale;
}

// The state of a softmax over some keys, for G query heads: largest score, sum, weighted values.
template <int D, int G>
__global__ void __launch_bounds__(kThreads)
    attention_kernel(const __grid_constant__ DecodeAttention a, int splits) {
  constexpr int lanes = kLanes<D>, teams = kThreads / lanes, state = D + 2;
  __shared__ __align__(16) float q[G][D];
  __shared__ __align__(16) float fresh[2][D];  // the new key and value
  __shared__ float states[kWarps][G][state];
  __shared__ float factors[kMostSplits][G], merged[G][2];  // merged: largest score, sum
  __shared__ bool last;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = static_cast<int>(blockIdx.x) % a.kv_heads,
            split = static_cast<int>(blockIdx.x) / a.kv_heads;
  const int team = threadIdx.x / lanes, part = threadIdx.x % lanes;
  int position, first, keys, each, used;  // used: splits that have keys
  const auto share_keys = [&] {
    position = *static_cast<const volatile int*>(a.position);
    first = a.window == 0 ? 0 : static_cast<int>(position / a.window * a.window);
    keys = position + 1 - first;
    each = max(kFewestKeys, (keys + splits - 1) / splits);
    used = (keys + each - 1) / each;
  };
  const auto place_of = [&](int key) {
    return a.window == 0 ? key : static_cast<int>((first + key) % a.window);
  };
  const auto offset_in = [&](int block, int key) {
    return ((static_cast<int64_t>(block) * a.block + place_of(key) % a.block) * a.kv_heads + head) * D;
  };
  const auto block_of = [&](int key) { return __ldcg(a.block_table + place_of(key) / a.block); };
  auto* const cached_keys = static_cast<__nv_bfloat16*>(a.keys);
  auto* const cached_values = static_cast<__nv_bfloat16*>(a.values);
  // Of the next key of this team.
  uint4 next_key{}, next_value{};
  const auto load = [&](int block, int key) {
    const int64_t from = offset_in(block, key) + part * 8;
    next_key = __ldcg(reinterpret_cast<const uint4*>(cached_keys + from));
    next_value = __ldcg(reinterpret_cast<const uint4*>(cached_values + from));
  };
  // Earlier keys do not depend on the step's earlier kernels, so they are loaded before those have ended.
  // Position and table may still be the last step's; then all is done anew below.
  Rotation<D> rotation;
  share_keys();
  rotation.set(a, position, lane);
  const int guess = split * each + team;
  int guessed_block = -1;
  if (guess < min(keys - 1, (split + 1) * each)) {
    guessed_block = block_of(guess);
    load(guessed_block, guess);
  }
  const int guessed_position = position;
  wait_for_previous_kernel();
  share_keys();
  if (split >= used) return;
  if (position != guessed_position) rotation.set(a, position, lane);
  const int begin = split * each, end = min(keys, begin + each);

  const float temperature =
      a.temperature_scale == 0
          ? 1.0f
          : 1 + a.temperature_scale * log1pf(floorf(static_cast<float>(position + 1) / a.floor_scale));
  for (int i = warp; i < G + 2; i += kThreads / 32) {
    if (i < G) {
      prepare_head<D>(a, a.qkv + (head * G + i) * D, q[i], rotation, temperature * rsqrtf(D), true, lane);
    } else {
      prepare_head<D>(a, a.qkv + (a.heads + (i - G) * a.kv_heads + head) * D, fresh[i - G], rotation, 1.0f,
                      i == G, lane);
    }
  }
  if (const int key = begin + team; key < min(end, keys - 1)) {
    const int block = block_of(key);
    if (position != guessed_position || block != guessed_block) load(block, key);
  }
  __syncthreads();
  if (end == keys) {  // this split has the new one
    const int64_t to = offset_in(block_of(keys - 1), keys - 1);
    for (int i = threadIdx.x; i < D; i += kThreads) {
      const __nv_bfloat16 k = __float2bfloat16_rn(fresh[0][i]), v = __float2bfloat16_rn(fresh[1][i]);
      cached_keys[to + i] = k;
      cached_values[to + i] = v;
      fresh[0][i] = __bfloat162float(k);
      fresh[1][i] = __bfloat162float(v);
    }
    __syncthreads();
  }

  float query[G][8], sum[G][8] = {}, most[G], total[G] = {};
#pragma unroll
  for (int g = 0; g < G; ++g) {
    most[g] = -INFINITY;
#pragma unroll
    for (int i = 0; i < 8; ++i) query[g][i] = q[g][part * 8 + i];
  }
  // All teams of a warp go round equally often, because they shuffle together.
  for (int round = begin; round < end; round += teams) {
    const int key = round + team;
    const bool there = key < end;
    float k[8], v[8];
    unpack8(next_key, k);
    unpack8(next_value, v);
    if (there && key == keys - 1) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        k[i] = fresh[0][part * 8 + i];
        v[i] = fresh[1][part * 8 + i];
      }
    }
    if (const int next = key + teams; next < min(end, keys - 1)) load(block_of(next), next);
#pragma unroll
    for (int g = 0; g < G; ++g) {
      float score = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) score = fmaf(query[g][i], k[i], score);
#pragma unroll
      for (int step = lanes / 2; step > 0; step /= 2) score += __shfl_xor_sync(~0u, score, step);
      if (!there) continue;
      const float larger = fmaxf(most[g], score);
      const float keep = expf(most[g] - larger), weight = expf(score - larger);
      most[g] = larger;
      total[g] = total[g] * keep + weight;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[g][i] = sum[g][i] * keep + weight * v[i];
    }
  }
  // A warp's teams, then the warps, then the splits.
#pragma unroll
  for (int step = lanes; step < 32; step *= 2) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const float other = __shfl_xor_sync(~0u, most[g], step), larger = fmaxf(most[g], other);
      const float keep = most[g] == -INFINITY ? 0 : expf(most[g] - larger);
      const float take = other == -INFINITY ? 0 : expf(other - larger);
      most[g] = larger;
      total[g] = total[g] * keep + __shfl_xor_sync(~0u, total[g], step) * take;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[g][i] = sum[g][i] * keep + __shfl_xor_sync(~0u, sum[g][i], step) * take;
    }
  }
  if (lane < lanes) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
#pragma unroll
      for (int i = 0; i < 8; ++i) states[warp][g][part * 8 + i] = sum[g][i];
      if (part == 0) {
        states[warp][g][D] = most[g];
        states[warp][g][D + 1] = total[g];
      }
    }
  }
  __syncthreads();

  // weigh: every state's weight and all their sums; a warp has a head, a lane a state.
  const auto weigh = [&](int count, const auto& at) {
    for (int g = warp; g < G; g += kWarps) {
      const float here = lane < count ? at(lane, g, D) : -INFINITY;
      const float sums = lane < count ? at(lane, g, D + 1) : 0;
      float largest = here;
      for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
      const float weight = here == -INFINITY ? 0 : expf(here - largest);
      float weights = weight * sums;
      for (int step = 16; step > 0; step /= 2) weights += __shfl_xor_sync(~0u, weights, step);
      factors[lane][g] = weight;
      if (lane == 0) {
        merged[g][0] = largest;
        merged[g][1] = weights;
      }
    }
    __syncthreads();
  };
  // put(head, value, sum) for all values.
  const auto merge = [&](int count, const auto& at, const auto& put) {
    constexpr int each = (G * D + kThreads - 1) / kThreads;
    float sums[each] = {};
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
#pragma unroll
      for (int j = 0; j < each; ++j) {
        const int which = min(static_cast<int>(threadIdx.x) + j * kThreads, G * D - 1);
        sums[j] += factors[i][which / D] * at(i, which / D, which % D);
      }
    }
#pragma unroll
    for (int j = 0; j < each; ++j) {
      const int which = threadIdx.x + j * kThreads;
      if (which < G * D) put(which / D, which % D, sums[j]);
    }
  };
  auto* const counters = static_cast<unsigned*>(a.workspace);
  float* const stored =
      reinterpret_cast<float*>(counters + 128) + static_cast<int64_t>(head) * kMostSplits * G * state;
  const auto warp_state = [&](int i, int g, int value) { return states[i][g][value]; };
  const int busy_warps = min(kWarps, (end - begin + 32 / lanes - 1) / (32 / lanes));
  weigh(busy_warps, warp_state);
  merge(busy_warps, warp_state, [&](int g, int value, float all) {
    if (used == 1) {
      a.out[(head * G + g) * D + value] = all / merged[g][1];
      return;
    }
    float* const to = stored + (split * G + g) * state;
    to[value] = all;
    if (value < 2) to[D + value] = merged[g][value];
  });
  if (used == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // for the whole block, whose writes the barrier has put before it
    last = atomicAdd(counters + head, 1) + 1 == static_cast<unsigned>(used);
    if (last) counters[head] = 0;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  const auto split_state = [&](int s, int g, int v) { return __ldcg(stored + (s * G + g) * state + v); };
  weigh(used, split_state);
  // Not before: behind the weights that the next kernel fetches, each of the few loads here would wait for
  // microseconds.
  allow_next_kernel();
  merge(used, split_state,
        [&](int g, int value, float all) { a.out[(head * G + g) * D + value] = all / merged[g][1]; });
}

template <int D, int G>
void run(const DecodeAttention& a, void* stream) {
  const auto splits =
      static_cast<int>(std::clamp<int64_t>((a.context + kFewestKeys - 1) / kFewestKeys, 1, kMostSplits));
  launch(attention_kernel<D, G>, dim3(a.kv_heads * splits), kThreads, 0, stream, "attention", a, splits);
}

template <int D>
bool run_for_group(const DecodeAttention& a, void* stream) {
  switch (a.heads / a.kv_heads) {
    case 1:
      return run<D, 1>(a, stream), true;
    case 2:
      return run<D, 2>(a, stream), true;
    case 4:
      return run<D, 4>(a, stream), true;
    case 5:
      return run<D, 5>(a, stream), true;
    case 8:
      return run<D, 8>(a, stream), true;
  }
  return false;
}

}  // namespace

uint64_t decode_attention_workspace_bytes(int heads, int, int head_dim) {
  return 128 * sizeof(unsigned) + static_cast<uint64_t>(heads) * kMostSplits * (head_dim + 2) * sizeof(float);
}

void decode_attention(const DecodeAttention& a, void* stream) {
  bool supported = a.kv_heads <= 128;
  if (a.head_dim == 128) {
    supported = supported && run_for_group<128>(a, stream);
  } else {
    supported = supported && a.head_dim == 64 && run_for_group<64>(a, stream);
  }
  if (supported) return;
  throw ConfigError("attention with " + std::to_string(a.heads) + " heads, " + std::to_string(a.kv_heads) +
                    " of them with keys, of " + std::to_string(a.head_dim) + " values is not supported");
}

}  // namespace lighter::kernels
