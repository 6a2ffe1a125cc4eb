// How kernels are launched, and how they hand over to the next one (programmatic dependent launch).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "runtime/error.h"

namespace lighter::kernels {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw DeviceError(std::string("CUDA kernel: ") + what + ": " + cudaGetErrorString(error));
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&value, attribute, device), "device attribute");
  return value;
}

inline int processors() {
  static const int count = device_attribute(cudaDevAttrMultiProcessorCount);
  return count;
}

struct Grid {
  Grid(dim3 all, unsigned of_a_cluster = 1) : blocks(all), cluster(of_a_cluster) {}
  dim3 blocks;
  unsigned cluster;  // consecutive ones that run together
};

// Launches so that the kernel may start before the previous one of the stream has ended; every kernel waits
// for that end itself, at the latest before it touches what the previous one wrote. All kernels ask for the
// same split of the first-level memory, the largest shared part: a multiprocessor cannot change it, and so
// takes no block of the next kernel, while a block is on it.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, int threads, int64_t shared_bytes, void* stream,
            const char* what, const Arguments&... arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes)),
        what);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared),
        what);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {grid.cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = grid.cluster > 1 ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), what);
}

__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace lighter::kernels
