#include <cuda_bf16.h>

#include <algorithm>

#include "runtime/kernels/decode_attention.h"
#include "runtime/kernels/launch.cuh"

namespace lighter::kernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
// The keys of a head are split among the blocks of a cluster, and where there may be many, of more clusters.
// Measured on an H100: up to kFewKeys one cluster is the fastest; many large ones leave multiprocessors idle.
struct Split {
  int blocks, clusters;
};
constexpr Split kFew{8, 1}, kMany{2, 16};
// A counter for each block's part of a head, of whole vectors.
__host__ __device__ constexpr int counters_of(int kv_heads) {
  return (kv_heads * kMany.blocks + 3) / 4 * 4;
}
constexpr int kFewestKeys = 16;  // of a block, where there are more clusters
constexpr int kAhead = 2;        // keys that a thread loads ahead

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

// The sum of one value of the output over some keys: weighted by exp(score - largest), and the weights' sum.
struct __align__(16) PartialSum {
  float sum, largest, weights, unused;
};

// The state of a softmax over some keys, for G query heads: largest score, sum, weighted values. Each block
// sends its state, in parts, to the blocks of its cluster, of which each merges a part. Up to 5 query heads
// leave registers for a block of qkv or o on the same multiprocessor, if with a few spilled: else the handing
// over to attention, and from it to o, takes 1.7 us instead of 0.5.
template <int D, int G, int Blocks, int Clusters>
__global__ void __launch_bounds__(kThreads, G < 8 ? 2 : 1)
    attention_kernel(const __grid_constant__ DecodeAttention a) {
  constexpr int lanes = kLanes<D>, teams = kThreads / lanes;
  constexpr int chunk = G * D / Blocks;  // values that each block merges
  __shared__ __align__(16) float q[G][D];
  __shared__ __align__(16) float fresh[2][D];  // the new key and value
  __shared__ __align__(16) float states[kWarps][G][D];
  __shared__ float ends[kWarps][G][2];                      // largest score, sum
  __shared__ float factors[kWarps][G], merged[G][2];        // merged: largest score, sum
  __shared__ float sent[G * D], sent_states[Blocks][G][2];  // by the cluster's blocks
  __shared__ bool last;
  __cluster_barrier_arrive_relaxed();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int rank = static_cast<int>(blockIdx.x) % Blocks, cluster = static_cast<int>(blockIdx.x) / Blocks,
            head = cluster % a.kv_heads, cluster_of_head = cluster / a.kv_heads;
  const int team = threadIdx.x / lanes, part = threadIdx.x % lanes;
  // The step's position, table and earlier keys are there before the kernel before this one has ended.
  const int position = __ldcg(a.position);
  const int first = a.window == 0 ? 0 : static_cast<int>(position / a.window * a.window);
  const int keys = position + 1 - first;
  const auto share_of = [&](int parts) { return (keys + parts - 1) / parts; };
  const int each = max(Clusters > 1 ? kFewestKeys : 1, share_of(Blocks * Clusters));
  const int used = Clusters > 1 ? share_of(each * Blocks) : 1;  // clusters of a head that have keys
  if (cluster_of_head >= used) return;
  const int begin = (cluster_of_head * Blocks + rank) * each, end = min(keys, begin + each);
  const bool has_new = begin < end && end == keys;
  const auto offset_of = [&](int key) {
    const int place = a.window == 0 ? key : static_cast<int>((first + key) % a.window);
    const int64_t row =
        static_cast<int64_t>(__ldcg(a.block_table + place / a.block)) * a.block + place % a.block;
    return (row * a.kv_heads + head) * D;
  };
  auto* const cached_keys = static_cast<__nv_bfloat16*>(a.keys);
  auto* const cached_values = static_cast<__nv_bfloat16*>(a.values);
  uint4 next_keys[kAhead]{}, next_values[kAhead]{};  // of this team
  const auto load = [&](int key, uint4& k, uint4& v) {
    if (key >= min(end, keys - 1)) return;
    const int64_t from = offset_of(key) + part * 8;
    k = __ldcg(reinterpret_cast<const uint4*>(cached_keys + from));
    v = __ldcg(reinterpret_cast<const uint4*>(cached_values + from));
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(begin + i * teams + team, next_keys[i], next_values[i]);
  Rotation<D> rotation;
  rotation.set(a, position, lane);
  const float temperature =
      a.temperature_scale == 0
          ? 1.0f
          : 1 + a.temperature_scale * log1pf(floorf(static_cast<float>(position + 1) / a.floor_scale));
  const int64_t new_at = offset_of(keys - 1);
  wait_for_previous_kernel();

  for (int i = warp; i < (has_new ? G + 2 : G); i += kWarps) {
    if (i < G) {
      prepare_head<D>(a, a.qkv + (head * G + i) * D, q[i], rotation, temperature * rsqrtf(D), true, lane);
      continue;
    }
    float* const to = fresh[i - G];
    prepare_head<D>(a, a.qkv + (a.heads + (i - G) * a.kv_heads + head) * D, to, rotation, 1.0f, i == G, lane);
    for (int j = lane; j < D; j += 32) {
      const __nv_bfloat16 rounded = __float2bfloat16_rn(to[j]);
      (i == G ? cached_keys : cached_values)[new_at + j] = rounded;
      to[j] = __bfloat162float(rounded);
    }
  }
  __syncthreads();
  // Not before the last loads: behind the weights that the next kernel fetches, each of them would wait for
  // microseconds.
  const bool all_loaded = each <= kAhead * teams;
  if (all_loaded) allow_next_kernel();

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
    unpack8(next_keys[0], k);
    unpack8(next_values[0], v);
#pragma unroll
    for (int i = 1; i < kAhead; ++i) {
      next_keys[i - 1] = next_keys[i];
      next_values[i - 1] = next_values[i];
    }
    load(key + kAhead * teams, next_keys[kAhead - 1], next_values[kAhead - 1]);
    if (there && key == keys - 1) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        k[i] = fresh[0][part * 8 + i];
        v[i] = fresh[1][part * 8 + i];
      }
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
      float score = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) score = fmaf(query[g][i], k[i], score);
#pragma unroll
      for (int step = lanes / 2; step > 0; step /= 2) score += __shfl_xor_sync(~0u, score, step);
      if (!there) continue;
      const float larger = fmaxf(most[g], score);
      const float keep = __expf(most[g] - larger), weight = __expf(score - larger);
      most[g] = larger;
      total[g] = total[g] * keep + weight;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[g][i] = sum[g][i] * keep + weight * v[i];
    }
  }
  if (!all_loaded) allow_next_kernel();
    // A warp's teams, then the warps, then the blocks, then the clusters.
#pragma unroll
  for (int step = lanes; step < 32; step *= 2) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const float other = __shfl_xor_sync(~0u, most[g], step), larger = fmaxf(most[g], other);
      const float keep = most[g] == -INFINITY ? 0 : __expf(most[g] - larger);
      const float take = other == -INFINITY ? 0 : __expf(other - larger);
      most[g] = larger;
      total[g] = total[g] * keep + __shfl_xor_sync(~0u, total[g], step) * take;
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[g][i] = sum[g][i] * keep + __shfl_xor_sync(~0u, sum[g][i], step) * take;
    }
  }
  if (lane < lanes) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
      auto* const to = reinterpret_cast<float4*>(&states[warp][g][part * 8]);
      to[0] = make_float4(sum[g][0], sum[g][1], sum[g][2], sum[g][3]);
      to[1] = make_float4(sum[g][4], sum[g][5], sum[g][6], sum[g][7]);
      if (part == 0) {
        ends[warp][g][0] = most[g];
        ends[warp][g][1] = total[g];
      }
    }
  }
  __syncthreads();

  // Every warp's weight and all their sums; a warp has a head, a lane a state.
  const int busy = min(kWarps, (end - begin + 32 / lanes - 1) / (32 / lanes));
  for (int g = warp; g < G; g += kWarps) {
    const float here = lane < busy ? ends[lane][g][0] : -INFINITY;
    const float sums = lane < busy ? ends[lane][g][1] : 0;
    float largest = here;
    for (int step = 4; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    const float weight = here == -INFINITY ? 0 : __expf(here - largest);
    float weights = weight * sums;
    for (int step = 4; step > 0; step /= 2) weights += __shfl_xor_sync(~0u, weights, step);
    if (lane < kWarps) factors[lane][g] = weight;
    if (lane == 0) {
      merged[g][0] = largest;
      merged[g][1] = weights;
    }
  }
  __cluster_barrier_wait();  // all of the cluster run
  __syncthreads();
  for (int i = threadIdx.x; i < G * Blocks; i += kThreads) {
    auto* const to = static_cast<float*>(__cluster_map_shared_rank(sent_states[rank][i % G], i / G));
    to[0] = merged[i % G][0];
    to[1] = merged[i % G][1];
  }
  for (int i = threadIdx.x; i < G * D; i += kThreads) {
    float all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < busy) all += factors[w][i / D] * states[w][i / D][i % D];
    }
    static_cast<float*>(__cluster_map_shared_rank(sent + rank * chunk, i / chunk))[i % chunk] = all;
  }
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
  const auto merge = [](int count, const auto& at) {
    PartialSum all{0, -INFINITY, 0, 0};
    for (int i = 0; i < count; ++i) all.largest = fmaxf(all.largest, at(i).largest);
    for (int i = 0; i < count; ++i) {
      const PartialSum one = at(i);
      const float weight = one.largest == -INFINITY ? 0 : __expf(one.largest - all.largest);
      all.sum = fmaf(weight, one.sum, all.sum);
      all.weights = fmaf(weight, one.weights, all.weights);
    }
    return all;
  };
  auto* const counters = static_cast<unsigned*>(a.workspace);
  auto* const stored = reinterpret_cast<PartialSum*>(counters + counters_of(a.kv_heads)) +
                       static_cast<int64_t>(head) * Clusters * G * D + rank * chunk;
  float* const out = a.out + head * G * D + rank * chunk;
  for (int i = threadIdx.x; i < chunk; i += kThreads) {
    const int g = (rank * chunk + i) / D;
    const PartialSum all = merge(Blocks, [&](int from) {
      return PartialSum{sent[from * chunk + i], sent_states[from][g][0], sent_states[from][g][1], 0};
    });
    if (used == 1) {
      out[i] = all.sum / all.weights;
    } else {
      stored[cluster_of_head * G * D + i] = all;
    }
  }
  if (used == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned* const counter = counters + head * Blocks + rank;
    __threadfence();  // for the whole block, whose writes the barrier has put before it
    last = atomicAdd(counter, 1) + 1 == static_cast<unsigned>(used);
    if (last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  for (int i = threadIdx.x; i < chunk; i += kThreads) {
    const PartialSum all = merge(used, [&](int from) {
      const float4 v = __ldcg(reinterpret_cast<const float4*>(stored + from * G * D + i));
      return PartialSum{v.x, v.y, v.z, 0};
    });
    out[i] = all.sum / all.weights;
  }
}

template <int D, int G>
void run(const DecodeAttention& a, void* stream) {
  const auto launch_split = [&](auto kernel, Split split) {
    launch(kernel, Grid(dim3(a.kv_heads * split.clusters * split.blocks), split.blocks), kThreads, 0, stream,
           "attention", a);
  };
  if (a.context <= kFewKeys) {
    launch_split(attention_kernel<D, G, kFew.blocks, kFew.clusters>, kFew);
  } else {
    launch_split(attention_kernel<D, G, kMany.blocks, kMany.clusters>, kMany);
  }
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

uint64_t decode_attention_workspace_bytes(int heads, int kv_heads, int head_dim) {
  return counters_of(kv_heads) * sizeof(unsigned) +
         static_cast<uint64_t>(heads) * head_dim * kMany.clusters * sizeof(PartialSum);
}

void decode_attention(const DecodeAttention& a, void* stream) {
  if (a.head_dim == 128 && run_for_group<128>(a, stream)) return;
  if (a.head_dim == 64 && run_for_group<64>(a, stream)) return;
  throw ConfigError("attention with " + std::to_string(a.heads) + " heads, " + std::to_string(a.kv_heads) +
                    " of them with keys, of " + std::to_string(a.head_dim) + " values is not supported");
}

}  // namespace lighter::kernels
