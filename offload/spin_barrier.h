// Waiting without sleeping: a parked thread takes tens of µs to wake, so the CPU's workers spin. Thread-safe.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lighter::offload {

// One turn of a spinning loop. Now and then the core is offered to others, for where there are fewer cores
// than spinning threads.
inline void spin(uint32_t& turns) {
#if defined(__x86_64__)
  _mm_pause();
#endif
  if (++turns % 4096 == 0) std::this_thread::yield();
}

// Rounds that a fixed number of workers go through together: each arrives, and the last one releases the
// others. Rounds are numbered 1, 2, … by each worker for itself.
class SpinBarrier {
 public:
  explicit SpinBarrier(int workers) : workers_(static_cast<uint64_t>(workers)) {}

  // True for the last worker of the round. What the others did before is visible to it.
  bool arrive(uint64_t round) {
    return arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == round * workers_;
  }
  void release(uint64_t round) { released_.store(round, std::memory_order_release); }
  // What was done before release() is visible after this was true.
  bool released(uint64_t round) const { return released_.load(std::memory_order_acquire) >= round; }

  // Only while no worker is between arrive() and released().
  void reset() {
    arrived_ = 0;
    released_ = 0;
  }

 private:
  const uint64_t workers_;
  alignas(64) std::atomic<uint64_t> arrived_ = 0;
  alignas(64) std::atomic<uint64_t> released_ = 0;  // waited on, so not where the others arrive
};

}  // namespace lighter::offload
