// Reads memory as fast as a GPU can, to know how fast that is.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lighter::kernels {

// Enqueues on `stream` (a cudaStream_t) of the current device. memory: of the device or mapped, aligned to
// 16, like bytes. sum: one, in device memory; holds nothing of use. Throws DeviceError if the launch fails.
void read_memory(const std::byte* memory, uint64_t bytes, uint64_t* sum, void* stream);

}  // namespace lighter::kernels
