// CUDA: words from the host without a copy engine, which would have to be waited for.
#pragma once

#include <atomic>
#include <cstdint>

namespace lighter {

// Both enqueue on `stream` (a cudaStream_t of the current device) and return at once. Throw DeviceError if a
// launch fails.

// The values travel as a kernel's parameters: they are read before this returns.
void put_values(int64_t* to, const int64_t* values, int64_t count, void* stream);

// The stream goes on when *word, in page-locked host memory, is `value` or a later one.
void hold_stream(const std::atomic<uint32_t>* word, uint32_t value, void* stream);

}  // namespace lighter
