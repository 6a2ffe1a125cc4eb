// Where every slice is, as one immutable version. Readers keep the version they began with; a new one is
// published between steps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "runtime/moe/expert_id.h"

namespace lighter::offload {

struct SliceLocation {
  static constexpr int16_t kHost = -1;

  int16_t device = kHost;  // index of the device that holds it, or kHost
  int32_t slot = -1;       // on that device
  const std::byte* address = nullptr;

  bool on_device() const { return device >= 0; }
};

struct ResidencyTable {
  uint64_t version = 0;
  ExpertGrid grid;
  std::vector<SliceLocation> locations;  // by grid.index()

  const SliceLocation& at(SliceId id) const { return locations[grid.index(id)]; }
};

using ResidencyVersion = std::shared_ptr<const ResidencyTable>;

}  // namespace lighter::offload
