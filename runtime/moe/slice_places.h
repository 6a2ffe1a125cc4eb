#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace lighter {

// Where every slice is, for kernels that find slices by themselves.
struct SlicePlaces {
  uint64_t version = 0;                  // another one when anything has changed; never 0
  std::vector<const std::byte*> device;  // by grid index; null: not on the device
  std::vector<const std::byte*> host;    // likewise; null: no home on the host; the same in all versions
};

}  // namespace lighter
