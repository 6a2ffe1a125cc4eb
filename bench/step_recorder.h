// Records what one step does, with libtorch's own profiler (Kineto): operations on the CPU, and on CUDA
// kernels and copies with the GPU's own times, each kernel of a CUDA graph on its own. Not thread-safe; one
// recording at a time in a process.
#pragma once

#include <functional>

#include "bench/measure.h"
#include "runtime/moe/miss_workers.h"

namespace lighter::bench {

// Makes two steps and keeps the second. step: false if there is no room for one more. reads_host_memory: some
// blocks of the experts' kernels may read slices there. Lanes: "CPU" (operations, without those inside them,
// and calls of the CUDA runtime, but not those that only wait), "GPU" (kernels) and "PCIe" (copies between
// host and device, and kernels that read host memory, for all their time). The note says what is missing, and
// why.
// cpu_spans: asked for after the steps; what lies within the second becomes events of the lane "CPU", which
// in a CUDA graph has nothing else. Throws what a step throws.
Timeline record_timeline(const std::function<bool()>& step, bool cuda, bool reads_host_memory,
                         const std::function<std::vector<MissSpan>()>& cpu_spans);

}  // namespace lighter::bench
