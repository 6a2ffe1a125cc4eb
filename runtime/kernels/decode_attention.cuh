// The attention part of a decode program. A block has a head of the keys and a split of the earlier positions.
#pragma once

#include "runtime/kernels/decode_part.cuh"

namespace lighter::kernels {

constexpr int kMostSplits = 16;
constexpr int kFewestKeys = 16;  // of a split
constexpr int kStateWarps = (kWarps + 1) / 2;
constexpr int kMostLinesAhead = 512;

__device__ inline int splits_of(const DecodeAttention& a) {
  return max(1, min(static_cast<int>(gridDim.x) / a.kv_heads, kMostSplits));
}

// A key belongs to a warp, D / 32 of its values to a lane, as they are stored.
template <int D>
struct StoredValues {
  unsigned words[D / 64];

  __device__ void load(const __nv_bfloat16* from) {
    if constexpr (D == 128) {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      words[0] = v.x;
      words[1] = v.y;
    } else {
      words[0] = *reinterpret_cast<const unsigned*>(from);
    }
  }
  __device__ float operator[](int i) const {
    return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000);
  }
};

// One warp: a head of D values from qkv into shared memory, rotated and normed.
template <int D>
__device__ inline void prepare_head(const DecodeAttention& a, const float* from, float* to, int position,
                             float scale, bool rotate, int lane) {
  float squares = 0;
  for (int i = lane; i < D / 2; i += 32) {
    const int first = a.interleaved ? 2 * i : i, second = a.interleaved ? 2 * i + 1 : i + D / 2;
    float x = __ldcg(from + first), y = __ldcg(from + second);
    if (rotate && a.rope) {
      float sine, cosine;
      sincosf(static_cast<float>(position) * a.inverse_frequencies[i], &sine, &cosine);
      const float rotated = x * cosine - y * sine;
      y = x * sine + y * cosine;
      x = rotated;
    }
    squares += x * x + y * y;
    to[first] = x;
    to[second] = y;
  }
  for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
  __syncwarp();
  if (rotate && a.qk_norm) scale *= rsqrtf(squares / D + a.eps);
  for (int i = lane; i < D; i += 32) to[i] *= scale;
}

template <int D, int G>
struct AttentionScratch {
  float q[G][D];
  float fresh[2][D];  // the new key and value
  // The state of a softmax over some keys: weighted values, largest score, sum.
  float states[kStateWarps][G][D + 2];
  float factors[kMostSplits][G], merged[G][2];  // merged: largest score, sum
  bool last;
};

// Which keys a block sees.
struct KeyShare {
  int first, keys, begin, end, used;  // used: splits that have keys

  __device__ KeyShare(const DecodeAttention& a, int position, int split) {
    const int splits = splits_of(a);
    first = a.window == 0 ? 0 : static_cast<int>(position / a.window * a.window);
    keys = position + 1 - first;
    const int each = max(kFewestKeys, (keys + splits - 1) / splits);
    used = (keys + each - 1) / each;
    begin = split * each;
    end = min(keys, begin + each);
  }
};

// Also of those since the last multiple of the window, whose first one lies where the cache begins.
__device__ inline int64_t offset_of_key(const DecodeAttention& a, int head, int key) {
  const int block = static_cast<unsigned>(key) / static_cast<unsigned>(a.block);
  const int64_t row = static_cast<int64_t>(__ldg(a.block_table + block)) * a.block + (key - block * a.block);
  return (row * a.kv_heads + head) * a.head_dim;
}

// One warp, a part ahead: earlier keys do not depend on this step.
__device__ inline void fetch_keys_ahead(const DecodeAttention& a) {
  const int head = blockIdx.x % a.kv_heads, split = blockIdx.x / a.kv_heads;
  if (split >= splits_of(a)) return;
  const KeyShare share(a, *a.position, split);
  const int lines = a.head_dim / 64;
  for (int i = threadIdx.x % 32; i < (share.end - share.begin) * 2 * lines && i < kMostLinesAhead; i += 32) {
    const int key = share.begin + i / (2 * lines);
    if (key >= share.keys - 1) break;
    const auto* const rows = static_cast<const __nv_bfloat16*>(i / lines % 2 == 0 ? a.keys : a.values);
    asm volatile("prefetch.global.L2 [%0];" ::"l"(rows + offset_of_key(a, head, key) + i % lines * 64));
  }
}

template <int D, int G>
__device__ void attend(const DecodeAttention& a, std::byte* memory) {
  constexpr int each = D / 32, state = D + 2;
  auto& s = *reinterpret_cast<AttentionScratch<D, G>*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int head = blockIdx.x % a.kv_heads, split = blockIdx.x / a.kv_heads;
  if (split >= splits_of(a)) return;
  const int position = *a.position;
  const KeyShare share(a, position, split);
  const int keys = share.keys, begin = share.begin, end = share.end, used = share.used;
  if (split >= used) return;
  const auto offset_of = [&](int key) { return offset_of_key(a, head, key); };

  const float temperature =
      a.temperature_scale == 0
          ? 1.0f
          : 1 + a.temperature_scale * log1pf(floorf(static_cast<float>(position + 1) / a.floor_scale));
  for (int i = warp; i < G + 2; i += kWarps) {
    if (i < G) {
      prepare_head<D>(a, a.qkv + (head * G + i) * D, s.q[i], position, temperature * rsqrtf(D), true, lane);
    } else {
      prepare_head<D>(a, a.qkv + (a.heads + (i - G) * a.kv_heads + head) * D, s.fresh[i - G], position, 1.0f,
                      i == G, lane);
    }
  }
  sync_workers();
  auto* const cached_keys = static_cast<__nv_bfloat16*>(a.keys);
  auto* const cached_values = static_cast<__nv_bfloat16*>(a.values);
  if (end == keys) {  // this split has the new one
    const int64_t to = offset_of(keys - 1);
    for (int i = threadIdx.x; i < D; i += kThreads) {
      const __nv_bfloat16 k = __float2bfloat16_rn(s.fresh[0][i]), v = __float2bfloat16_rn(s.fresh[1][i]);
      cached_keys[to + i] = k;
      cached_values[to + i] = v;
      s.fresh[0][i] = __bfloat162float(k);
      s.fresh[1][i] = __bfloat162float(v);
    }
    sync_workers();
  }

  float query[G][each], sum[G][each] = {}, most[G], total[G] = {};
#pragma unroll
  for (int g = 0; g < G; ++g) {
    most[g] = -INFINITY;
#pragma unroll
    for (int i = 0; i < each; ++i) query[g][i] = s.q[g][lane * each + i];
  }
  const auto take = [&](const auto& k, const auto& v) {
    float scores[G];
#pragma unroll
    for (int g = 0; g < G; ++g) {
      scores[g] = 0;
#pragma unroll
      for (int i = 0; i < each; ++i) scores[g] = fmaf(query[g][i], k[i], scores[g]);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
#pragma unroll
      for (int g = 0; g < G; ++g) scores[g] += __shfl_xor_sync(~0u, scores[g], step);
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
      const float larger = fmaxf(most[g], scores[g]);
      const float keep = __expf(most[g] - larger), weight = __expf(scores[g] - larger);
      most[g] = larger;
      total[g] = total[g] * keep + weight;
#pragma unroll
      for (int i = 0; i < each; ++i) sum[g][i] = sum[g][i] * keep + weight * v[i];
    }
  };
  constexpr int together = 4;  // keys of which a warp reads at once
  const int stored_end = min(end, keys - 1);
#pragma unroll 1
  for (int first = begin + warp; first < stored_end; first += together * kWarps) {
    StoredValues<D> k[together], v[together];
#pragma unroll
    for (int n = 0; n < together; ++n) {
      const int64_t from = offset_of(min(first + n * kWarps, stored_end - 1)) + lane * each;
      k[n].load(cached_keys + from);
      v[n].load(cached_values + from);
    }
#pragma unroll
    for (int n = 0; n < together; ++n) {
      if (first + n * kWarps < stored_end) take(k[n], v[n]);
    }
  }
  if (end == keys && warp == 0) take(s.fresh[0] + lane * each, s.fresh[1] + lane * each);
  // The warps of each half of the block, then the warps, then the splits.
  const auto put_state = [&] {
#pragma unroll
    for (int g = 0; g < G; ++g) {
      float* const to = s.states[warp % kStateWarps][g];
#pragma unroll
      for (int i = 0; i < each; ++i) to[lane * each + i] = sum[g][i];
      if (lane == 0) {
        to[D] = most[g];
        to[D + 1] = total[g];
      }
    }
  };
  if (warp >= kStateWarps) put_state();
  sync_workers();
  if (warp < kStateWarps) {
    if (warp + kStateWarps < kWarps) {
#pragma unroll
      for (int g = 0; g < G; ++g) {
        const float* const from = s.states[warp][g];
        const float other = from[D], larger = fmaxf(most[g], other);
        const float keep = most[g] == -INFINITY ? 0 : expf(most[g] - larger);
        const float other_keep = other == -INFINITY ? 0 : expf(other - larger);
        most[g] = larger;
        total[g] = total[g] * keep + from[D + 1] * other_keep;
#pragma unroll
        for (int i = 0; i < each; ++i) sum[g][i] = sum[g][i] * keep + from[lane * each + i] * other_keep;
      }
    }
    __syncwarp();
    put_state();
  }
  sync_workers();

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
      if (lane < kMostSplits) s.factors[lane][g] = weight;
      if (lane == 0) {
        s.merged[g][0] = largest;
        s.merged[g][1] = weights;
      }
    }
    sync_workers();
  };
  // put(head, value, sum) for all values.
  const auto merge = [&](int count, const auto& at, const auto& put) {
    constexpr int turns = (G * D + kThreads - 1) / kThreads;
    float sums[turns] = {};
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
#pragma unroll
      for (int j = 0; j < turns; ++j) {
        const int which = min(static_cast<int>(threadIdx.x) + j * kThreads, G * D - 1);
        sums[j] += s.factors[i][which / D] * at(i, which / D, which % D);
      }
    }
#pragma unroll
    for (int j = 0; j < turns; ++j) {
      const int which = threadIdx.x + j * kThreads;
      if (which < G * D) put(which / D, which % D, sums[j]);
    }
  };
  auto* const counters = static_cast<unsigned*>(a.workspace);
  float* const stored =
      reinterpret_cast<float*>(counters + 128) + static_cast<int64_t>(head) * kMostSplits * G * state;
  const auto warp_state = [&](int i, int g, int value) { return s.states[i][g][value]; };
  constexpr int busy_warps = kStateWarps;  // of the others, weights are 0
  weigh(busy_warps, warp_state);
  merge(busy_warps, warp_state, [&](int g, int value, float all) {
    if (used == 1) {
      a.out[(head * G + g) * D + value] = all / s.merged[g][1];
      return;
    }
    float* const to = stored + (split * G + g) * state;
    to[value] = all;
    if (value < 2) to[D + value] = s.merged[g][value];
  });
  if (used == 1) return;
  __threadfence();
  sync_workers();
  if (threadIdx.x == 0) {
    s.last = atomicAdd(counters + head, 1) + 1 == static_cast<unsigned>(used);
    if (s.last) counters[head] = 0;
  }
  sync_workers();
  if (!s.last) return;
  __threadfence();
  const auto split_state = [&](int i, int g, int v) { return __ldcg(stored + (i * G + g) * state + v); };
  weigh(used, split_state);
  merge(used, split_state,
        [&](int g, int value, float all) { a.out[(head * G + g) * D + value] = all / s.merged[g][1]; });
}


// Every split of every head; G: heads / kv_heads.
__device__ inline void run_attention(const DecodeAttention& a, std::byte* memory) {
  const int group = a.heads / a.kv_heads;
  if (a.head_dim == 128) {
    switch (group) {
      case 1: return attend<128, 1>(a, memory);
      case 2: return attend<128, 2>(a, memory);
      case 4: return attend<128, 4>(a, memory);
      case 5: return attend<128, 5>(a, memory);
      case 8: return attend<128, 8>(a, memory);
    }
  } else {
    switch (group) {
      case 1: return attend<64, 1>(a, memory);
      case 2: return attend<64, 2>(a, memory);
      case 4: return attend<64, 4>(a, memory);
      case 5: return attend<64, 5>(a, memory);
      case 8: return attend<64, 8>(a, memory);
    }
  }
}

// 0: not supported.
inline int64_t attention_scratch_bytes(int head_dim, int group) {
  if (head_dim != 64 && head_dim != 128) return 0;
  if (group != 1 && group != 2 && group != 4 && group != 5 && group != 8) return 0;
  return 4 * (static_cast<int64_t>(group) * head_dim + 2 * head_dim + kStateWarps * group * (head_dim + 2) +
              kMostSplits * group + 2 * group + 4);
}

}  // namespace lighter::kernels
