// Numbers that count up and may wrap around, as those of steps do.
#pragma once

#include <cstdint>

namespace lighter {

// Whether a step's number is `than` or a later one, also after 2^32 steps.
constexpr bool step_reached(uint32_t step, uint32_t than) {
  return static_cast<int32_t>(step - than) >= 0;
}

}  // namespace lighter
