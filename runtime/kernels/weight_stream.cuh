// A warp's own ring of weights in shared memory, filled by bulk copies (cp.async.bulk) that its first lane
// issues ahead. Weights never change, so the ring is filled before the previous kernel has ended.
//
// A stage holds one piece of weights. Scales (and minima) come with a piece when there are any, into the side
// ring, whose slots are used in turn by the pieces that bring some.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace lighter::kernels {

constexpr int kStreamWarps = 16;   // of a block
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

// The same for every warp of a launch; side_bytes: of one slot, scales and minima together. kept: scales
// serve several pieces, so that a slot is still in use when its piece's stage is passed.
struct StreamShape {
  int stages = 0;
  int stage_bytes = kStageBytes;
  int side_bytes = 0;
  bool kept = false;

  __host__ __device__ int side_slots() const { return stages + kept; }
  __host__ __device__ int barrier_bytes() const { return (stages + 1) / 2 * 16; }
  __host__ __device__ int bytes_per_warp() const {
    return stages * stage_bytes + side_slots() * side_bytes + barrier_bytes();
  }
  __host__ __device__ int bytes() const { return kStreamWarps * bytes_per_warp(); }
};

class WarpStream {
 public:
  // memory: of the whole block, bytes() at a multiple of 128.
  __device__ WarpStream(std::byte* memory, const StreamShape& shape, int warp, int lane) : shape_(shape) {
    stages_ = memory + warp * shape.stages * shape.stage_bytes;
    sides_ = memory + kStreamWarps * shape.stages * shape.stage_bytes +
             warp * shape.side_slots() * shape.side_bytes;
    barriers_ = to_shared(
        memory + kStreamWarps * (shape.stages * shape.stage_bytes + shape.side_slots() * shape.side_bytes) +
        warp * shape.barrier_bytes());
    if (lane == 0) {
      for (int i = 0; i < shape.stages; ++i) barrier_init(barriers_ + i * 8);
      barriers_are_made();
    }
    __syncwarp();
  }

  // One lane: the next piece. scales and minimums: side bytes each, or none.
  __device__ void issue(const std::byte* weights, uint32_t bytes, const std::byte* scales,
                        const std::byte* minimums, uint32_t side_bytes) {
    const uint32_t barrier = begin_issue(bytes + side_bytes * ((scales != nullptr) + (minimums != nullptr)));
    bulk_copy(to_shared(stages_ + in_ * shape_.stage_bytes), weights, bytes, barrier, policy_);
    issue_side(scales, minimums, side_bytes, barrier);
    end_issue();
  }

  // The same for rows that do not lie together: `rows` pieces of row_bytes each.
  __device__ void issue_rows(const std::byte* weights, int rows, uint32_t row_bytes, uint32_t stride,
                             const std::byte* scales, const std::byte* minimums, uint32_t side_bytes) {
    const uint32_t barrier =
        begin_issue(rows * row_bytes + side_bytes * ((scales != nullptr) + (minimums != nullptr)));
    for (int i = 0; i < rows; ++i) {
      bulk_copy(to_shared(stages_ + in_ * shape_.stage_bytes) + i * stride, weights + i * stride, row_bytes,
                barrier, policy_);
    }
    issue_side(scales, minimums, side_bytes, barrier);
    end_issue();
  }

  // All lanes: waits for the oldest piece.
  __device__ const std::byte* wait() {
    barrier_wait(barriers_ + out_ * 8, phase_);
    return stages_ + out_ * shape_.stage_bytes;
  }
  // The side slot of the oldest piece that brought scales and is not yet passed.
  __device__ const std::byte* side() const { return sides_ + side_out_ * shape_.side_bytes; }
  __device__ void next_side() { side_out_ = side_out_ + 1 == shape_.side_slots() ? 0 : side_out_ + 1; }
  // All lanes, when all have read the piece; then its stage may be issued anew.
  __device__ void pass() {
    __syncwarp();
    if (++out_ == shape_.stages) {
      out_ = 0;
      phase_ ^= 1;
    }
  }

 private:
  __device__ uint32_t begin_issue(uint32_t bytes) {
    const uint32_t barrier = barriers_ + in_ * 8;
    barrier_expect(barrier, bytes);
    return barrier;
  }
  __device__ void issue_side(const std::byte* scales, const std::byte* minimums, uint32_t side_bytes,
                             uint32_t barrier) {
    if (scales == nullptr) return;
    const uint32_t to = to_shared(sides_ + side_in_ * shape_.side_bytes);
    bulk_copy(to, scales, side_bytes, barrier, policy_);
    if (minimums != nullptr) bulk_copy(to + side_bytes, minimums, side_bytes, barrier, policy_);
    side_in_ = side_in_ + 1 == shape_.side_slots() ? 0 : side_in_ + 1;
  }
  __device__ void end_issue() { in_ = in_ + 1 == shape_.stages ? 0 : in_ + 1; }

  const StreamShape& shape_;
  std::byte* stages_;
  std::byte* sides_;
  uint32_t barriers_;
  const uint64_t policy_ = read_once();
  int in_ = 0, side_in_ = 0;  // of the issuing lane
  int out_ = 0, side_out_ = 0;
  uint32_t phase_ = 0;
};

}  // namespace lighter::kernels
