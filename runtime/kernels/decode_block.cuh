// A block has three warps more than compute. One finds out which weights those need next, one issues their copies. The
// third announces that the block has come to a barrier of blocks, and waits there; behind it, it fetches what the parts
// to come need.
#pragma once

#include "runtime/kernels/decode_part.cuh"
#include "runtime/kernels/device_clock.cuh"

namespace lighter::kernels {

constexpr int kFeedingWarp = kWarps, kFillingWarp = kWarps + 1, kJoiningWarp = kWarps + 2;
constexpr int kBlockThreads = kThreads + 96;
constexpr int kJoiningThreads = kThreads + 32;  // those that compute, and the joining warp

// One thread: until *at is at least `least`.
__device__ inline void await_count(const unsigned* at, unsigned least) {
  unsigned long long begin = 0;
  for (unsigned turns = 1; load_acquire(at) < least; ++turns) {
    if (turns % 65536 != 0) continue;
    // Rather a failed launch than a hang; what waits for the CPU gives up long before.
    if (begin == 0) begin = now_ns();
    if (now_ns() - begin > 8ull * kWaitLimitMs * 1000000) __trap();
  }
}

// All computing warps: a barrier of blocks, passed when `of` have come (those of earlier rounds included); 0: comes
// without waiting. part: the one that begins behind it, or -1.
__device__ inline void join(BlockMemory& block, unsigned* at, unsigned of, int part = -1) {
  if (threadIdx.x == 0) block.request = {at, of, part};
  asm volatile("bar.arrive 2, %0;" ::"n"(kJoiningThreads) : "memory");
  asm volatile("bar.sync 3, %0;" ::"n"(kJoiningThreads) : "memory");
}
// There will be no more.
__device__ inline void end_joining(BlockMemory& block) {
  if (threadIdx.x == 0) block.request.at = nullptr;
  asm volatile("bar.arrive 2, %0;" ::"n"(kJoiningThreads) : "memory");
}

// The joining warp, until end_joining(). begun(part) is called when one has begun.
template <typename Begun>
__device__ void serve_joining(BlockMemory& block, const Begun& begun) {
  for (;;) {
    asm volatile("bar.sync 2, %0;" ::"n"(kJoiningThreads) : "memory");
    const JoinRequest now = block.request;
    if (now.at == nullptr) return;
    if (threadIdx.x % 32 == 0) {
      __threadfence();
      atomicAdd(now.at, 1);
      if (now.of > 0) await_count(now.at, now.of);
    }
    __syncwarp();
    asm volatile("bar.arrive 3, %0;" ::"n"(kJoiningThreads) : "memory");
    if (now.part >= 0) begun(now.part);
  }
}

// The feeding warp: a lane for each warp that computes. count: of all parts.
__device__ inline void feed_rings(BlockMemory& block, int count) {
  const int warp = threadIdx.x % 32;
  if (warp >= kWarps) return;
  RunQueue& queue = block.queues[warp];
  Feed feed(warp);
  while (feed.part() < count) {
    WeightRun run;
    const bool found = queue.has_room() && feed.next(block.kept, block.parts_there, run);
    if (found) queue.put(run);
    block.fed_parts[warp] = feed.part();
    if (!found) __nanosleep(20);
  }
}

// The filling warp, likewise.
__device__ inline void fill_rings(BlockMemory& block, int count) {
  const int warp = threadIdx.x % 32;
  if (warp >= kWarps) return;
  RingFiller filler(RingPlace(block.rings, block.shape, warp), block.queues[warp]);
  while (block.fed_parts[warp] < count || !filler.idle()) filler.fill();
}

}  // namespace lighter::kernels
