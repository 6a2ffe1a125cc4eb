// CUDA: words from the host that travel as a kernel's parameters, so that no copy engine is waited for.
#pragma once

#include <cstdint>

namespace lighter {

// Enqueues on `stream` (a cudaStream_t of the current device) and returns at once; values are read before.
// Throws DeviceError if a launch fails.
void put_values(int64_t* to, const int64_t* values, int64_t count, void* stream);

}  // namespace lighter
