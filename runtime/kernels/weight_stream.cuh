// A warp's own ring of weights in shared memory, filled by bulk copies (cp.async.bulk) that one of its lanes
// issues ahead. Weights never change, so the ring is filled before the previous kernel has ended.
//
// A stage holds one piece of weights. Scales (and minima) come with a piece when there are any, into the side
// ring, whose slots are used in turn by the pieces that bring some.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace lighter::kernels {

// Of a block. With few, each has twice the registers.
constexpr int kStreamWarps = 16, kFewStreamWarps = 8;
constexpr int kStageBytes = 2560;  // at most
constexpr int kMostStages = 8;

__device__ inline uint32_t to_shared(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ inline void barrier_init(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}

__device__ inline void barriers_are_made() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// For what is read once in a step: it shall not drive out of the second-level cache what is used all the
// time.
__device__ inline uint64_t read_once() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Both ends and bytes are multiples of 16.
__device__ inline void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier,
                                 uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], "
      "%4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// Brings weights into the second-level cache. Both are multiples of 16.
__device__ inline void bulk_prefetch(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra.uni DONE;\n"
      "bra.uni AGAIN;\n"
      "DONE:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// This thread's warp, in a way that tells the compiler that it is the same for all lanes.
__device__ inline int this_warp() {
  return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
}

// All lanes of a warp: true in one of them, always the same. In what it guards the compiler knows that there
// is one; behind lane == 0 it makes a loop around each bulk copy.
__device__ inline bool elected() {
  uint32_t is_this;
  asm volatile(
      "{\n"
      ".reg .pred this_one;\n"
      "elect.sync _|this_one, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, this_one;\n"
      "}"
      : "=r"(is_this));
  return is_this != 0;
}

// The same for every warp of a launch; side_bytes: of one slot, scales and minima together. kept: scales
// serve several pieces, so that a slot is still in use when its piece's stage is passed.
struct StreamShape {
  int warps = kStreamWarps;
  int stages = 0;
  int stage_bytes = kStageBytes;
  int side_bytes = 0;
  bool kept = false;

  __host__ __device__ int side_slots() const { return stages + kept; }
  __host__ __device__ int barrier_bytes() const { return (stages + 1) / 2 * 16; }
  __host__ __device__ int bytes_per_warp() const {
    return stages * stage_bytes + side_slots() * side_bytes + barrier_bytes();
  }
  __host__ __device__ int bytes() const { return warps * bytes_per_warp(); }
};

// Sides: how many kinds of values a piece's side has, scales and minima.
template <int Sides>
class WarpStream {
 public:
  // memory: of the whole block, bytes() at a multiple of 128.
  __device__ WarpStream(std::byte* memory, const StreamShape& shape, int warp, int lane) : shape_(shape) {
    stages_ = memory + warp * shape.stages * shape.stage_bytes;
    sides_ = memory + shape.warps * shape.stages * shape.stage_bytes +
             warp * shape.side_slots() * shape.side_bytes;
    stages_at_ = to_shared(stages_);
    sides_at_ = to_shared(sides_);
    barriers_ = to_shared(
        memory + shape.warps * (shape.stages * shape.stage_bytes + shape.side_slots() * shape.side_bytes) +
        warp * shape.barrier_bytes());
    if (lane == 0) {
      for (int i = 0; i < shape.stages; ++i) barrier_init(barriers_ + i * 8);
      barriers_are_made();
    }
    __syncwarp();
  }

  // All lanes alike: the next piece. with_side: it brings scales, and minimums if there are any, of
  // side_bytes each.
  __device__ void issue(const std::byte* weights, uint32_t bytes, bool with_side, const std::byte* scales,
                        const std::byte* minimums, uint32_t side_bytes) {
    issue_rows(weights, 1, bytes, 0, with_side, scales, minimums, side_bytes);
  }

  // The same for rows that do not lie together: `rows` pieces of row_bytes each.
  __device__ void issue_rows(const std::byte* weights, int rows, uint32_t row_bytes, uint32_t stride,
                             bool with_side, const std::byte* scales, const std::byte* minimums,
                             uint32_t side_bytes) {
    if (elected()) {
      const uint32_t barrier = barriers_ + in_ * 8, to = stages_at_ + in_ * shape_.stage_bytes;
      barrier_expect(barrier, rows * row_bytes + (with_side ? Sides * side_bytes : 0));
      for (int i = 0; i < rows; ++i) {
        bulk_copy(to + i * stride, weights + i * stride, row_bytes, barrier, policy_);
      }
      if (Sides > 0 && with_side) {
        const uint32_t side = sides_at_ + side_in_ * shape_.side_bytes;
        bulk_copy(side, scales, side_bytes, barrier, policy_);
        if (Sides > 1) bulk_copy(side + side_bytes, minimums, side_bytes, barrier, policy_);
      }
    }
    in_ = in_ + 1 == shape_.stages ? 0 : in_ + 1;
    if (Sides > 0 && with_side) side_in_ = side_in_ + 1 == shape_.side_slots() ? 0 : side_in_ + 1;
  }

  // All lanes: waits for the oldest piece.
  __device__ const std::byte* wait() {
    barrier_wait(barriers_ + out_ * 8, phase_);
    return stages_ + out_ * shape_.stage_bytes;
  }
  // The side slot of the oldest piece that brought scales and is not yet passed.
  __device__ const std::byte* side() const { return sides_ + side_out_ * shape_.side_bytes; }
  __device__ void next_side() {
    if (Sides > 0) side_out_ = side_out_ + 1 == shape_.side_slots() ? 0 : side_out_ + 1;
  }
  // All lanes, when all have read the piece; then its stage may be issued anew.
  __device__ void pass() {
    __syncwarp();
    if (++out_ == shape_.stages) {
      out_ = 0;
      phase_ ^= 1;
    }
  }

 private:
  const StreamShape& shape_;
  std::byte* stages_;
  std::byte* sides_;
  uint32_t stages_at_, sides_at_, barriers_;  // shared memory's own addresses
  const uint64_t policy_ = read_once();
  int in_ = 0, side_in_ = 0;
  int out_ = 0, side_out_ = 0;
  uint32_t phase_ = 0;
};

}  // namespace lighter::kernels
