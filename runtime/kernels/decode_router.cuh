// Routing by a few blocks: each scores some of the experts, and one posts x to the CPU; the last one to finish
// chooses, and lists where the chosen experts' slices are.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "runtime/kernels/decode.h"
#include "runtime/kernels/decode_activations.cuh"
#include "runtime/kernels/device_clock.cuh"
#include "runtime/kernels/launch.cuh"
#include "runtime/kernels/signals.cuh"

namespace lighter::kernels {

constexpr int kMostRouterBlocks = 16;
constexpr int kScored = 4;  // experts of a block, where that is enough
constexpr int kMostScored = kMostDecodeExperts / kMostRouterBlocks;
static_assert(kMostDecodeTokens == 1);

// Shared memory of a routing block; what RouterRoom says lies behind it.
struct __align__(16) RouterScratch {
  float partial[kStreamWarps][1 + kMostScored];  // sum of squares, then the experts' dot products
  float logits[kMostDecodeExperts];
  float weights[kMostDecodeExperts];
  int chosen[kMostChosen];
  bool last;
};

// What a routing block brings close while the kernels before it run, and the residual stream; but for the tables
// a thread reads what it has copied itself. In registers the loop over it would have to be unrolled, and
// instructions that run but once have to come from afar.
struct RouterRoom {
  float4* residual;           // [hidden / 4]
  uint2* norm;                // likewise
  uint2* rows;                // [rows_of(), hidden / 4]: of the router, the first that this block scores
  const std::byte** tables;   // device, then host; where they are too large, null

  // Tables of more slices are read where they are.
  static constexpr int kMostSlices = 1024;
  __host__ __device__ static int slices_of(const DecodeRouter& r) {
    return r.experts * r.slices <= kMostSlices ? r.experts * r.slices : 0;
  }
  // With more the block would need more shared memory than its kernel's others do, and keep the next kernel out.
  __host__ __device__ static int rows_of(const DecodeRouter& r) {
    return r.hidden <= 6144 ? kScored : kScored / 2;
  }
  __host__ __device__ static int64_t bytes(const DecodeRouter& r) {
    return static_cast<int64_t>(sizeof(RouterScratch)) + r.hidden / 4 * (16 + 8 + 8 * rows_of(r)) +
           16 * slices_of(r);
  }
  __device__ RouterRoom(std::byte* memory, const DecodeRouter& r) {
    const int quads = static_cast<int>(r.hidden / 4);
    residual = reinterpret_cast<float4*>(memory + sizeof(RouterScratch));
    norm = reinterpret_cast<uint2*>(residual + quads);
    rows = norm + quads;
    tables = slices_of(r) == 0 ? nullptr : reinterpret_cast<const std::byte**>(rows + rows_of(r) * quads);
  }
};

// Copies that go on by themselves, until await_copies() of the same thread.
template <int Bytes>
__device__ inline void copy_ahead(void* to, const void* from) {
  static_assert(Bytes == 8 || Bytes == 16);
  if constexpr (Bytes == 16) {  // not by way of the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to_shared(to)), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to_shared(to)), "l"(from) : "memory");
  }
}
__device__ inline void await_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

__host__ __device__ inline int scoring_blocks(const DecodeRouter& r) {
  const int blocks = (r.experts + kScored - 1) / kScored;
  return blocks < kMostRouterBlocks ? blocks : kMostRouterBlocks;
}
// The last one posts x, which would keep the others.
__host__ __device__ inline int router_blocks(const DecodeRouter& r) {
  return scoring_blocks(r) + (r.post.x != nullptr);
}

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

__device__ inline float4 bf16x4(uint2 v) {
  return {__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000), __uint_as_float(v.y << 16),
          __uint_as_float(v.y & 0xffff0000)};
}

// Whole block: brings what does not depend on the step's earlier kernels closer.
__device__ inline void fetch_ahead(const void* from, int64_t bytes) {
  for (int64_t i = threadIdx.x * 128; i < bytes; i += blockDim.x * 128) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const std::byte*>(from) + i));
  }
}

constexpr int kLogitsOfLane = kMostDecodeExperts / 32;  // a lane has experts lane, lane + 32, ...

// One warp: the largest of the logits that are not taken, which it then is; the lower number wins a tie. All
// lanes learn it.
__device__ inline int take_best(const float (&mine)[kLogitsOfLane], unsigned& taken, int lane, float* logit) {
  int best = INT_MAX;
  float most = 0;
#pragma unroll
  for (int i = 0; i < kLogitsOfLane; ++i) {
    if ((taken >> i & 1) == 0 && (best == INT_MAX || mine[i] > most)) {
      best = lane + 32 * i;
      most = mine[i];
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const int other = __shfl_xor_sync(~0u, best, step);
    const float value = __shfl_xor_sync(~0u, most, step);
    // What is no number is never larger, so some expert is chosen in any case.
    const bool better = best == INT_MAX || value > most || (value == most && other < best);
    if (other != INT_MAX && better) {
      best = other;
      most = value;
    }
  }
  best = __shfl_sync(~0u, best, 0);
  *logit = __shfl_sync(~0u, most, 0);
  if (best % 32 == lane) taken |= 1u << best / 32;
  return best;
}

// One warp: the k experts by falling logit (the lower number wins a tie) and their weights. forced: lane i's
// is the expert of rank i, if they are forced.
__device__ inline void choose(const DecodeRouter& r, RouterScratch& scratch, int forced, int lane) {
  float mine[kLogitsOfLane], most = -INFINITY;
  unsigned taken = 0;
#pragma unroll
  for (int i = 0; i < kLogitsOfLane; ++i) {
    const int expert = lane + 32 * i;
    mine[i] = expert < r.experts ? scratch.logits[expert] : 0;
    if (expert >= r.experts) {
      taken |= 1u << i;
    } else {
      scratch.weights[expert] = 0;
      most = fmaxf(most, mine[i]);
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
  __syncwarp();
  float total = 0;
  for (int rank = 0; rank < r.k; ++rank) {
    int best = INT_MAX;
    float logit = 0;
    if (r.forced != nullptr) {
      best = __shfl_sync(~0u, forced, rank);
      logit = scratch.logits[best];
    } else {
      best = take_best(mine, taken, lane, &logit);
    }
    // Never exactly 0, which would mean: not chosen.
    const float weight =
        fmaxf(r.score == RouterScore::sigmoid ? 1.0f / (1.0f + expf(-logit)) : expf(logit - most), 1e-30f);
    total += weight;
    if (lane == 0) {
      scratch.weights[best] = weight;
      r.chosen[rank] = scratch.chosen[rank] = best;
    }
  }
  __syncwarp();
  for (int e = lane; e < r.experts; e += 32) {
    if (r.score == RouterScore::softmax_normalised) scratch.weights[e] /= total;
    r.weights[e] = scratch.weights[e];
  }
}

// The lanes of a group, for quad `at` of x: to the CPU.
__device__ inline void post_x(const MissPostTarget& to, int at, float4 v) {
  const int lanes = to.group / 4;
  float most = largest(0, v);
  for (int step = lanes / 2; step > 0; step /= 2) most = max_nan(most, __shfl_xor_sync(~0u, most, step));
  const float scale = divide(most, 127.0f, 1.0f / 127.0f);
  reinterpret_cast<uint32_t*>(to.x)[at] = quantized(v, scale, inverse_of(scale));
  if (at % lanes == 0) to.x_scales[at / lanes] = scale;
}

// One warp: tells the CPU. The hidden state has been written before.
__device__ inline void post(const DecodeRouter& r, const RouterScratch& scratch, float factor, int lane) {
  if (lane < r.k) {
    const int expert = scratch.chosen[lane];
    r.post.experts[lane] = expert;
    r.post.weights[lane] = scratch.weights[expert];
  }
  if (lane == 0 && r.post.factors != nullptr) *r.post.factors = factor;
  __threadfence_system();
  __syncwarp();
  if (lane == 0) *reinterpret_cast<volatile unsigned*>(r.post.posted) = *r.step;
}

// One warp: the slices of the chosen experts, ascending, into the lists. share: *zero_copy_share.
__device__ inline void list_slices(const DecodeRouter& r, const RouterScratch& scratch, const RouterRoom& room,
                                   unsigned share, int lane) {
  const std::byte* const* const device_table = room.tables != nullptr ? room.tables : r.device_table;
  const std::byte* const* const host_table =
      room.tables != nullptr ? room.tables + r.experts * r.slices : r.host_table;
  int residents = 0, missed = 0, position = 0;
  // How many are missed decides how many of them the GPU reads from host memory, so count first.
  for (int pass = 0; pass < 2; ++pass) {
    const int groups_here =
        r.zero_copy == nullptr ? 0 : zero_copy_groups(missed * r.groups_per_slice, share);
    const int zero_copied = (groups_here + r.groups_per_slice - 1) / r.groups_per_slice;
    if (pass == 1 && lane == 0) {
      r.resident->jobs = residents;
      r.resident->groups = residents * r.groups_per_slice;
      if (r.zero_copy != nullptr) {
        r.zero_copy->jobs = zero_copied;
        r.zero_copy->groups = groups_here;
      }
    }
    residents = missed = position = 0;
    for (int base = 0; base < r.experts; base += 32) {
      unsigned chosen = __ballot_sync(~0u, base + lane < r.experts && scratch.weights[base + lane] != 0);
      for (; chosen != 0; chosen &= chosen - 1) {
        const int expert = base + __ffs(static_cast<int>(chosen)) - 1;
        for (int first = 0; first < r.slices; first += 32) {
          const int slice = first + lane;
          const bool there = slice < r.slices;
          const std::byte* const address = there ? device_table[expert * r.slices + slice] : nullptr;
          const unsigned in_residents = __ballot_sync(~0u, address != nullptr);
          const unsigned in_missed = __ballot_sync(~0u, there && address == nullptr);
          const unsigned before = (1u << lane) - 1;
          if (pass == 1 && there) {
            const int here = position + slice;
            if (address != nullptr) {
              r.resident->entries[residents + __popc(in_residents & before)] = {address, expert, here};
            }
            const int miss = missed + __popc(in_missed & before);
            const bool mine = address == nullptr && miss < zero_copied;
            if (mine) {
              const std::byte* const from = r.arrivals.slots != nullptr
                                                ? r.arrivals.slots + miss * r.arrivals.slot_bytes
                                                : host_table[expert * r.slices + slice];
              r.zero_copy->entries[miss] = {from, expert, here};
            }
            if (r.computed != nullptr) r.computed[here] = address != nullptr || mine;
          }
          residents += __popc(in_residents);
          missed += __popc(in_missed);
        }
        position += r.slices;
      }
    }
  }
  if (lane == 0 && r.positions != nullptr) *r.positions = position;
}

// Whole block: what the coming layer's router makes of the residual stream, for the CPU. The norm's
// factor would not change who is best. As a part of this kernel it has ended before the next layer posts, and
// before the residual stream changes.
template <int Warps>
__device__ void guess_next(const DecodeRouter& r, std::byte* memory) {
  auto& scratch = *reinterpret_cast<RouterScratch*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int quads = static_cast<int>(r.hidden / 4);
  const auto* const norm = static_cast<const uint2*>(r.guess.norm);
  const auto* const residual = reinterpret_cast<const float4*>(r.input.residual);
  allow_next_kernel();
  wait_for_previous_kernel();
  if (r.guess.forced == nullptr) {
    for (int expert = warp; expert < r.experts; expert += Warps) {
      const auto* const row =
          static_cast<const uint2*>(r.guess.weight) + static_cast<int64_t>(expert) * quads;
      float dot = 0;
      for (int i = lane; i < quads; i += 32) {
        const float4 v = __ldcg(residual + i), n = bf16x4(norm[i]), w = bf16x4(row[i]);
        dot += v.x * n.x * w.x + v.y * n.y * w.y + v.z * n.z * w.z + v.w * n.w * w.w;
      }
      dot = warp_sum(dot);
      if (lane == 0) scratch.logits[expert] = dot;
    }
    __syncthreads();
  }
  if (warp != 0) return;
  int mine = 0;  // lane i: of rank i
  if (r.guess.forced != nullptr) {
    if (lane < r.k) mine = __ldcg(r.guess.forced + lane);
  } else {
    float logits[kLogitsOfLane], logit;
    unsigned taken = 0;
#pragma unroll
    for (int i = 0; i < kLogitsOfLane; ++i) {
      const int expert = lane + 32 * i;
      logits[i] = expert < r.experts ? scratch.logits[expert] : 0;
      if (expert >= r.experts) taken |= 1u << i;
    }
    for (int rank = 0; rank < r.k; ++rank) {
      const int best = take_best(logits, taken, lane, &logit);
      if (lane == rank) mine = best;
    }
  }
  if (__any_sync(~0u, mine < 0)) return;
  if (lane < r.k) r.guess.experts[lane] = mine;
  __threadfence_system();
  __syncwarp();
  if (lane == 0) *reinterpret_cast<volatile unsigned*>(r.guess.posted) = *r.step;
}

// Block `block` of router_blocks(), of Warps warps. Sets *lists to 1 when the lists and weights are there.
template <int Warps>
__device__ void route(const DecodeRouter& r, std::byte* memory, unsigned* lists, int block) {
  constexpr int threads = Warps * 32;
  auto& scratch = *reinterpret_cast<RouterScratch*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int quads = static_cast<int>(r.hidden / 4);
  const int scorers = scoring_blocks(r);
  const bool posts = block == scorers;
  // Experts block, block + scorers, ...
  const int scored = posts ? 0 : (r.experts - block + scorers - 1) / scorers;
  const auto* const rows = static_cast<const uint2*>(r.weight) + static_cast<int64_t>(block) * quads;
  const int64_t stride = static_cast<int64_t>(scorers) * quads;
  const auto* const norm = static_cast<const uint2*>(r.input.weight);
  const auto* const residual = reinterpret_cast<const float4*>(r.input.residual);
  const RouterRoom room(memory, r);
  const int rows_here = min(scored, RouterRoom::rows_of(r));
  // What does not depend on the step's earlier kernels, before those have ended.
#pragma unroll 1
  for (int i = threadIdx.x; i < quads; i += threads) {
    copy_ahead<8>(room.norm + i, norm + i);
    for (int e = 0; e < rows_here; ++e) copy_ahead<8>(room.rows + e * quads + i, rows + e * stride + i);
  }
  for (int e = rows_here; e < scored; ++e) fetch_ahead(rows + e * stride, r.hidden * 2);
  if (room.tables != nullptr) {
    const int slices = r.experts * r.slices;
    for (int i = threadIdx.x; i < slices; i += threads) {
      copy_ahead<8>(room.tables + i, r.device_table + i);
      if (r.zero_copy != nullptr) copy_ahead<8>(room.tables + slices + i, r.host_table + i);
    }
  } else if (block == 0) {
    const int64_t table_bytes = static_cast<int64_t>(r.experts) * r.slices * 8;
    fetch_ahead(r.device_table, table_bytes);
    if (r.zero_copy != nullptr) fetch_ahead(r.host_table, table_bytes);
  }
  const unsigned share = r.zero_copy == nullptr ? 0 : __ldcg(r.zero_copy_share);
  wait_for_previous_kernel();

  const int forced = r.forced != nullptr && lane < r.k ? __ldcg(r.forced + lane) : 0;
  for (int i = threadIdx.x; i < quads; i += threads) copy_ahead<16>(room.residual + i, residual + i);
  await_copies();
  // The norm's factor is the same for all values, so neither the dot products nor the CPU's x need wait for
  // it.
  float squares = 0, dots[kMostScored] = {};
#pragma unroll 1
  for (int i = threadIdx.x; i < quads; i += threads) {
    float4 v = room.residual[i];
    const float4 n = bf16x4(room.norm[i]);
    squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    v.x *= n.x;
    v.y *= n.y;
    v.z *= n.z;
    v.w *= n.w;
    if (posts) post_x(r.post, i, v);
#pragma unroll
    for (int e = 0; e < kMostScored; ++e) {
      if (e >= scored) break;
      const float4 w = bf16x4(e < rows_here ? room.rows[e * quads + i] : rows[e * stride + i]);
      dots[e] += v.x * w.x + v.y * w.y + v.z * w.z + v.w * w.w;
    }
  }
  squares = warp_sum(squares);
  if (lane == 0) scratch.partial[warp][0] = squares;
#pragma unroll
  for (int e = 0; e < kMostScored; ++e) {
    if (e >= scored) break;
    const float dot = warp_sum(dots[e]);
    if (lane == 0) scratch.partial[warp][1 + e] = dot;
  }
  __syncthreads();
  const auto total = [&](int which) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < Warps; ++i) sum += scratch.partial[i][which];
    return sum;
  };
  const float unit = rsqrtf(total(0) / static_cast<float>(r.hidden) + r.input.eps);
  if (static_cast<int>(threadIdx.x) < scored) {
    __stcg(r.logits + block + threadIdx.x * scorers, unit * total(1 + threadIdx.x));
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // for the whole block, whose writes the barrier has put before it
    scratch.last = atomicAdd(r.arrived, 1) + 1 == static_cast<unsigned>(router_blocks(r));
    if (scratch.last) *r.arrived = 0;
  }
  __syncthreads();
  if (!scratch.last) return;
  __threadfence();
  if (static_cast<int>(threadIdx.x) < r.experts) scratch.logits[threadIdx.x] = __ldcg(r.logits + threadIdx.x);
  __syncthreads();
  if (warp == 0) choose(r, scratch, forced, lane);
  // Meanwhile x goes on its way; the fence of the post then has little to wait for.
  if (warp == 1 && r.post.posted != nullptr) __threadfence_system();
  __syncthreads();
  // Not before: behind the weights that the next kernel fetches, the loads here would wait for microseconds.
  allow_next_kernel();
  if (warp == 1 && r.post.posted != nullptr) post(r, scratch, unit, lane);
  if (warp != 0) return;
  list_slices(r, scratch, room, share, lane);
  __syncwarp();  // the release is for all lanes
  if (lane != 0) return;
  store_release(lists, 1);
  if (r.times != nullptr) note_time(&r.times->routed);
}

}  // namespace lighter::kernels
