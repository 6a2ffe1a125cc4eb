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

// One thread: until *at is `value`. When it does not come in time, *error becomes 1 + layer, and the step's
// later waits do not wait. Loads of one address in host memory take a microsecond each, one after the other,
// so that only one thread of the GPU should wait for it.
__device__ inline void wait_for(const unsigned* at, unsigned value, unsigned* error, int layer) {
  const unsigned long long begin = now_ns();
  while (load_system(at) != value) {
    if (now_ns() - begin > kWaitLimitMs * 1000000ull || *reinterpret_cast<volatile unsigned*>(error) != 0) {
      atomicCAS(error, 0, 1 + layer);
      return;
    }
  }
}

}  // namespace lighter::kernels
