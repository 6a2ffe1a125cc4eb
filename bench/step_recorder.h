// Records what one step does, with libtorch's own profiler (Kineto): operations on the CPU, and on CUDA
// kernels and copies with the GPU's own times, each kernel of a CUDA graph on its own. Not thread-safe; one
// recording at a time in a process.
#pragma once

#include <functional>

#include "bench/measure.h"

namespace lighter::bench {

// Makes two steps and keeps the second. step: false if there is no room for one more. host_reading_blocks:
// the grid of kernels that read experts from host memory; 0: there are none. Lanes: "CPU" (operations,
// without those inside them, and calls of the CUDA runtime, but not those that only wait), "GPU" (kernels)
// and "PCIe" (copies between host and device, and kernels that read host memory). The note says what is
// missing, and why. Throws what a step throws.
Timeline record_timeline(const std::function<bool()>& step, bool cuda, int64_t host_reading_blocks);

}  // namespace lighter::bench
