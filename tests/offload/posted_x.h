// Activations as a GPU posts them to a mailbox.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "runtime/moe/miss_mailbox.h"

namespace lighter::offload {

inline void quantize_as_posted(const std::vector<float>& x, size_t group, const MissSlot& slot) {
  for (size_t first = 0; first < x.size(); first += group) {
    float most = 0;
    for (size_t i = first; i < first + group; ++i) most = std::max(most, std::fabs(x[i]));
    const float scale = slot.x_scales[first / group] = most / 127.0f;
    for (size_t i = first; i < first + group; ++i) {
      slot.x[i] = static_cast<int8_t>(std::nearbyint(x[i] / scale));
    }
  }
}

}  // namespace lighter::offload
