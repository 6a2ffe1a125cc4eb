// Routing by one block: scores, the chosen experts, and where their slices are. The steps are separated by
// barriers; everything is small.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "runtime/kernels/decode.h"
#include "runtime/kernels/decode_values.cuh"

namespace lighter::kernels {

// Shared memory of the routing block: the normed hidden state in fp32 first.
struct RouterScratch {
  float logits[kMostDecodeTokens][kMostDecodeExperts];
  float weights[kMostDecodeTokens][kMostDecodeExperts];
  float squares[kStreamWarps];
};

__host__ __device__ inline int64_t router_bytes(int64_t hidden, int tokens) {
  return hidden * tokens * 4 + static_cast<int64_t>(sizeof(RouterScratch));
}

__device__ inline void normed_in_fp32(const NormedInput& input, float* to, RouterScratch& scratch,
                                      int columns, int tokens) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto* const weight = static_cast<const __nv_bfloat16*>(input.weight);
  for (int token = 0; token < tokens; ++token) {
    const float* const from = input.residual + token * columns;
    float squares = 0;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
      const float value = __ldcg(from + i);
      to[token * columns + i] = value;
      squares += value * value;
    }
    for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
    __syncthreads();
    if (lane == 0) scratch.squares[warp] = squares;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < kStreamWarps; ++i) sum += scratch.squares[i];
    const float unit = rsqrtf(sum / static_cast<float>(columns) + input.eps);
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
      to[token * columns + i] *= unit * __bfloat162float(weight[i]);
    }
  }
  __syncthreads();
}

// One thread: a token's k experts by falling logit (the lower number wins a tie) and their weights.
__device__ inline void choose(const DecodeRouter& r, RouterScratch& scratch, int token) {
  const float* const logits = scratch.logits[token];
  float* const weights = scratch.weights[token];
  float most = logits[0];
  for (int e = 0; e < r.experts; ++e) {
    weights[e] = 0;
    most = fmaxf(most, logits[e]);
  }
  float total = 0;
  for (int rank = 0; rank < r.k; ++rank) {
    int best = -1;
    if (r.forced != nullptr) {
      best = r.forced[token * r.k + rank];
    } else {
      for (int e = 0; e < r.experts; ++e) {
        if (weights[e] == 0 && (best < 0 || logits[e] > logits[best])) best = e;
      }
    }
    // Never exactly 0, which would mean: not chosen.
    const float weight =
        r.score == RouterScore::sigmoid ? 1.0f / (1.0f + expf(-logits[best])) : expf(logits[best] - most);
    weights[best] = fmaxf(weight, 1e-30f);
    total += weights[best];
    r.chosen[token * r.k + rank] = best;
    r.post.experts != nullptr ? void(r.post.experts[token * r.k + rank] = best) : void();
  }
  if (r.score == RouterScore::softmax_normalised) {
    for (int e = 0; e < r.experts; ++e) weights[e] /= total;
  }
  for (int rank = 0; r.post.weights != nullptr && rank < r.k; ++rank) {
    r.post.weights[token * r.k + rank] = weights[r.chosen[token * r.k + rank]];
  }
}

// One warp: the slices of the chosen experts, ascending, into the lists.
__device__ inline void list_slices(const DecodeRouter& r, const RouterScratch& scratch, int lane) {
  int residents = 0, missed = 0, position = 0;
  // How many are missed decides how many of them the GPU reads from host memory, so count first.
  for (int pass = 0; pass < 2; ++pass) {
    const int groups_here =
        r.zero_copy == nullptr ? 0 : zero_copy_groups(missed * r.groups_per_slice, *r.zero_copy_share);
    const int zero_copied = (groups_here + r.groups_per_slice - 1) / r.groups_per_slice;
    if (pass == 1 && lane == 0) {
      r.resident->jobs = residents;
      r.resident->groups = residents * r.groups_per_slice;
      if (r.zero_copy != nullptr) {
        r.zero_copy->jobs = zero_copied;
        r.zero_copy->groups = groups_here;
      }
      if (r.fetched != nullptr) {
        r.fetched->jobs = missed;
        r.fetched->groups = missed * r.groups_per_slice;
      }
    }
    residents = missed = position = 0;
    for (int expert = 0; expert < r.experts; ++expert) {
      bool chosen = false;
      for (int token = 0; token < r.tokens; ++token) chosen |= scratch.weights[token][expert] != 0;
      if (!chosen) continue;
      for (int first = 0; first < r.slices; first += 32) {
        const int slice = first + lane;
        const bool there = slice < r.slices;
        const std::byte* const address = there ? r.device_table[expert * r.slices + slice] : nullptr;
        const unsigned in_residents = __ballot_sync(~0u, address != nullptr);
        const unsigned in_missed = __ballot_sync(~0u, there && address == nullptr);
        const unsigned before = (1u << lane) - 1;
        if (pass == 1 && there) {
          const int here = position + slice;
          if (address != nullptr) {
            r.resident->entries[residents + __popc(in_residents & before)] = {address, expert, here};
          }
          const int miss = missed + __popc(in_missed & before);
          const bool mine = address == nullptr && r.zero_copy != nullptr && miss < zero_copied;
          if (mine) r.zero_copy->entries[miss] = {r.host_table[expert * r.slices + slice], expert, here};
          if (address == nullptr && r.fetched != nullptr) {
            r.fetched->entries[miss] = {r.fetch_slots + miss * r.slice_bytes, expert, here};
          }
          if (r.computed != nullptr) r.computed[here] = address != nullptr || mine || r.fetched != nullptr;
        }
        residents += __popc(in_residents);
        missed += __popc(in_missed);
      }
      position += r.slices;
    }
  }
  if (lane == 0 && r.positions != nullptr) *r.positions = position;
}

// Whole block. memory: router_bytes().
__device__ inline void route_by_block(const DecodeRouter& r, std::byte* memory) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int hidden = static_cast<int>(r.hidden);
  float* const x = reinterpret_cast<float*>(memory);
  auto& scratch = *reinterpret_cast<RouterScratch*>(memory + r.hidden * r.tokens * 4);
  normed_in_fp32(r.input, x, scratch, hidden, r.tokens);
  if (r.post.posted != nullptr) {
    for (int i = threadIdx.x; i < hidden * r.tokens / 4; i += blockDim.x) {
      reinterpret_cast<float4*>(r.post.x)[i] = reinterpret_cast<const float4*>(x)[i];
    }
  }
  for (int expert = warp; expert < r.experts; expert += kStreamWarps) {
    const auto* const row = static_cast<const uint2*>(r.weight) + expert * (hidden / 4);
    float sums[kMostDecodeTokens] = {};
#pragma unroll 8
    for (int i = lane; i < hidden / 4; i += 32) {
      const uint2 w = row[i];
      for (int token = 0; token < r.tokens; ++token) {
        const float4 v = reinterpret_cast<const float4*>(x + token * hidden)[i];
        sums[token] += v.x * __uint_as_float(w.x << 16) + v.y * __uint_as_float(w.x & 0xffff0000) +
                       v.z * __uint_as_float(w.y << 16) + v.w * __uint_as_float(w.y & 0xffff0000);
      }
    }
    for (int token = 0; token < r.tokens; ++token) {
      for (int step = 16; step > 0; step /= 2) sums[token] += __shfl_xor_sync(~0u, sums[token], step);
      if (lane == 0) scratch.logits[token][expert] = sums[token];
    }
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < r.tokens) choose(r, scratch, threadIdx.x);
  __syncthreads();
  for (int i = threadIdx.x; i < r.tokens * r.experts; i += blockDim.x) {
    r.weights[i] = scratch.weights[i / r.experts][i % r.experts];
  }
  if (r.post.posted != nullptr) {
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) {
      *reinterpret_cast<volatile unsigned*>(r.post.posted) = *r.step;
      __threadfence_system();
    }
  }
  if (warp == 0) list_slices(r, scratch, lane);
  __threadfence();
  __syncthreads();
}

}  // namespace lighter::kernels
