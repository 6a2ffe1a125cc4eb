// Words in device memory by which blocks that run at the same time tell each other something.
#pragma once

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

}  // namespace lighter::kernels
