// Reads host memory as fast as one thread can, to time it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lighter {

// The sum of its 64-bit words. bytes: a multiple of 256.
uint64_t sum_of_words(const std::byte* from, uint64_t bytes);

}  // namespace lighter
