// Numbers that count up and may wrap around, as those of steps do.
#pragma once

#include <cstdint>

namespace lighter {

// Whether a step's number is `than` or a later one, also after 2^32 steps.
constexpr bool step_reached(uint32_t step, uint32_t than) {
  return static_cast<int32_t>(step - than) >= 0;
}

// Decode steps that can be enqueued at once. What the host and the device tell each other of a step lies in
// one of as many slots.
constexpr int kStepsAtOnce = 2;
constexpr int slot_of(uint32_t step) {
  return static_cast<int>((step - 1) % kStepsAtOnce);
}

}  // namespace lighter
