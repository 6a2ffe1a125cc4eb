// Words by which blocks that run at the same time, and the host, tell each other something.
#pragma once

#include "runtime/kernels/decode.h"
#include "runtime/kernels/device_clock.cuh"

namespace lighter::kernels {

// What the writer did before store_release() is visible once this has shown its value.
__device__ inline unsigned load_acquire(const unsigned* at) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

__device__ inline void store_release(unsigned* at, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

// One thread: until a block has set the word.
template <unsigned Nanoseconds>
__device__ inline void await(const unsigned* signal) {
  while (load_acquire(signal) == 0) __nanosleep(Nanoseconds);
}

// load_acquire() of words that the host or a copy engine writes.
__device__ inline unsigned load_system(const unsigned* at) {
  unsigned value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
// Of two words that the host writes as one. Nothing else is known to be visible with them.
__device__ inline unsigned long long load_system(const unsigned long long* at) {
  unsigned long long value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(at) : "memory");
  return value;
}

// Of one thread that waits for the host or a copy engine, from now on. When it ends, *error becomes 1 + layer,
// and with that everybody's.
class Patience {
 public:
  __device__ bool ends(unsigned* error, int layer) const {
    if (now_ns() - begin_ <= kWaitLimitMs * 1000000ull && *reinterpret_cast<volatile unsigned*>(error) == 0)
      return false;
    atomicCAS(error, 0, 1 + layer);
    return true;
  }

 private:
  unsigned long long begin_ = now_ns();
};

// One thread: until *at is `value`, or patience ends. Loads of one address in host memory take a microsecond
// each, one after the other, so that only one thread of the GPU should wait for it.
__device__ inline void wait_for(const unsigned* at, unsigned value, unsigned* error, int layer) {
  const Patience patience;
  while (load_system(at) != value && !patience.ends(error, layer)) {
  }
}

}  // namespace lighter::kernels
