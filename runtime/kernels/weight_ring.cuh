// Rings of weights in shared memory, one for each warp that computes, filled by bulk copies (cp.async.bulk) far ahead.
//
// Weights come in runs: some consecutive rows, in stages of equal size, with the scales (and minima) of all of them
// in one of two side slots; a small copy costs nearly as much as a stage, so few of them. One warp finds out which
// runs the others need, another issues the copies: each ring has only a few of them under way at a time, however many
// stages are free, because what a multiprocessor asks for comes in its order, and a block's other loads must not wait
// for weights that are needed later.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace lighter::kernels {

constexpr int kWarps = 13;  // of a block, those that compute: with the three others, registers are enough for all
constexpr int kThreads = kWarps * 32;
constexpr int kStageBytes = 2560;  // at most
constexpr int kMostStages = 8;
constexpr unsigned kUnderWay = 2;  // stages of a ring that are on their way at a time
constexpr int kSideSlots = 2;

// The block's dynamic shared memory. Places in it are kept as offsets, so that the compiler knows what they are.
__device__ inline std::byte* block_shared() {
  extern __shared__ __align__(128) std::byte memory[];
  return memory;
}

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

// Both ends and bytes are multiples of 16.
__device__ inline void bulk_copy(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

__device__ inline bool barrier_passed(uint32_t barrier, uint32_t parity) {
  uint32_t passed;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}"
      : "=r"(passed)
      : "r"(barrier), "r"(parity)
      : "memory");
  return passed != 0;
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

// The same for every warp of a launch.
struct RingShape {
  int stages = 0;
  int slot_bytes = 0;  // of a side slot: scales from its begin, minima from its middle

  __host__ __device__ int bytes_per_warp() const {
    return stages * kStageBytes + kSideSlots * slot_bytes + kMostStages * 8;
  }
  __host__ __device__ int bytes() const { return kWarps * bytes_per_warp(); }
};

// Consecutive rows to be copied. rows above 0: a stage is so many rows of row_bytes each, stride bytes apart.
struct WeightRun {
  const std::byte *from = nullptr, *scales = nullptr, *minimums = nullptr;
  int stages = 0;
  uint32_t stage_bytes = 0, side_bytes = 0;
  int rows = 0;
  uint32_t row_bytes = 0, stride = 0;
};

// In shared memory: the runs of a ring's warp that are not yet issued, and how far it has come. All counts only grow;
// run n lies at n % kSideSlots.
struct RunQueue {
  WeightRun runs[kSideSlots];
  volatile unsigned queued;              // of the warp that queues
  volatile unsigned issued;              // wholly; of the warp that issues
  volatile unsigned passed, runs_passed;  // stages and runs, of the warp that computes

  __device__ bool has_room() const { return queued - issued < kSideSlots; }
  __device__ void put(const WeightRun& run) {
    runs[queued % kSideSlots] = run;
    __threadfence_block();
    queued = queued + 1;
  }
};

// Where a ring lies.
struct RingPlace {
  int at, slots_at, barriers_at;  // in block_shared()
  int stage_count, slot_bytes;

  // rings: where all begin, a multiple of 128.
  __device__ RingPlace(int rings, const RingShape& shape, int warp)
      : at(rings + warp * shape.bytes_per_warp()),
        slots_at(at + shape.stages * kStageBytes),
        barriers_at(slots_at + kSideSlots * shape.slot_bytes),
        stage_count(shape.stages),
        slot_bytes(shape.slot_bytes) {}

  __device__ uint32_t barrier(int stage) const { return to_shared(block_shared()) + barriers_at + stage * 8; }
  // One thread, before anything else.
  __device__ void make_barriers() const {
    for (int i = 0; i < stage_count; ++i) barrier_init(barrier(i));
    barriers_are_made();
  }
};

// Of one lane of the warp that issues.
class RingFiller {
 public:
  __device__ RingFiller(const RingPlace& place, RunQueue& queue) : place_(place), queue_(queue) {}

  // Issues a stage if it is time. Whether it has.
  __device__ bool fill() {
    while (landed_ != issued_ && barrier_passed(place_.barrier(landed_stage_), landed_phase_)) {
      ++landed_;
      if (++landed_stage_ == place_.stage_count) {
        landed_stage_ = 0;
        landed_phase_ ^= 1;
      }
    }
    if (issued_ - landed_ >= kUnderWay) return false;
    if (issued_ - queue_.passed >= static_cast<unsigned>(place_.stage_count)) return false;
    bool sides = false;
    if (left_ == 0) {
      if (runs_begun_ - queue_.runs_passed >= kSideSlots || queue_.queued == runs_begun_) return false;
      __threadfence_block();
      run_ = queue_.runs[runs_begun_ % kSideSlots];
      left_ = run_.stages;
      sides = run_.scales != nullptr;
      ++runs_begun_;
      queue_.issued = runs_begun_;
    }
    issue(sides);
    --left_;
    return true;
  }
  __device__ bool idle() const { return left_ == 0 && queue_.queued == runs_begun_; }

 private:
  __device__ void issue(bool sides) {
    const uint32_t base = to_shared(block_shared());
    const uint32_t to = base + place_.at + in_ * kStageBytes, at = place_.barrier(in_);
    const uint32_t side = sides ? run_.side_bytes : 0;
    const uint32_t both = run_.minimums != nullptr ? 2 * side : side;
    barrier_expect(at, (run_.rows == 0 ? run_.stage_bytes : run_.rows * run_.row_bytes) + both);
    if (run_.rows == 0) {
      bulk_copy(to, run_.from, run_.stage_bytes, at);
    } else {
      for (int i = 0; i < run_.rows; ++i) {
        bulk_copy(to + i * run_.stride, run_.from + i * run_.stride, run_.row_bytes, at);
      }
    }
    if (sides) {
      const uint32_t slot = base + place_.slots_at + (runs_begun_ - 1) % kSideSlots * place_.slot_bytes;
      bulk_copy(slot, run_.scales, side, at);
      if (run_.minimums != nullptr) bulk_copy(slot + place_.slot_bytes / 2, run_.minimums, side, at);
    }
    run_.from += run_.stage_bytes;
    ++issued_;
    in_ = in_ + 1 == place_.stage_count ? 0 : in_ + 1;
  }

  const RingPlace place_;
  RunQueue& queue_;
  WeightRun run_;  // the run under way
  int left_ = 0, in_ = 0;
  unsigned issued_ = 0, runs_begun_ = 0, landed_ = 0;
  int landed_stage_ = 0;
  uint32_t landed_phase_ = 0;
};

// A ring as its warp uses it.
class WeightRing {
 public:
  __device__ WeightRing(const RingPlace& place, RunQueue& queue, int lane)
      : place_(place), queue_(queue), lane_(lane) {}

  // Waits for the oldest stage.
  __device__ const std::byte* wait() const {
    barrier_wait(place_.barrier(out_), phase_);
    return block_shared() + (place_.at + out_ * kStageBytes);
  }
  // Scales and minima of the run, once its first stage has been waited for.
  __device__ const std::byte* scales() const {
    return block_shared() + (place_.slots_at + runs_passed_ % kSideSlots * place_.slot_bytes);
  }
  __device__ const std::byte* minimums() const { return scales() + place_.slot_bytes / 2; }
  // When all lanes have read the stage; last: of its run.
  __device__ void pass(bool last) {
    ++passed_;
    runs_passed_ += last;
    if (++out_ == place_.stage_count) {
      out_ = 0;
      phase_ ^= 1;
    }
    __syncwarp();
    if (lane_ != 0) return;
    if (last) queue_.runs_passed = runs_passed_;
    queue_.passed = passed_;
  }

 private:
  const RingPlace place_;
  RunQueue& queue_;
  const int lane_;
  int out_ = 0;
  uint32_t phase_ = 0;
  unsigned passed_ = 0, runs_passed_ = 0;
};

}  // namespace lighter::kernels
