// Records what one step does, with libtorch's own profiler (Kineto): operations on the CPU, and on CUDA
// kernels and copies with the GPU's own times, those of CUDA graphs included. Not thread-safe; one recording
// at a time in a process.
#pragma once

#include <functional>
#include <optional>

#include "bench/measure.h"

namespace lighter::bench {

// Lanes: "CPU" (the operations of the thread that runs the step, without those inside them), "GPU" (kernels)
// and "PCIe" (copies between host and device). Nothing where the profiler cannot record.
std::optional<Timeline> record_timeline(const std::function<void()>& step, bool cuda);

}  // namespace lighter::bench
