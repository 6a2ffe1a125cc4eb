// The experts' home in host memory, page-locked, one buffer per layer. Slices that never leave the device
// have no home: nothing keeps a second copy of them.
#pragma once

#include <vector>

#include "runtime/device/device.h"
#include "runtime/moe/expert_id.h"

namespace lighter::offload {

class ExpertStore {
 public:
  // has_home: by grid index. Allocates nothing yet.
  ExpertStore(Device& device, const ExpertGrid& grid, const std::vector<bool>& has_home);

  // Allocates one layer's memory. Layers may be allocated by different threads.
  void allocate_layer(int layer);

  bool has_home(SliceId slice) const { return offset_[grid_.index(slice)] != kNone; }
  // The slice's home; null when it has none. Its layer must be allocated.
  std::byte* address(SliceId slice) const;
  uint64_t bytes() const;

 private:
  static constexpr uint64_t kNone = ~uint64_t{0};

  Device& device_;
  const ExpertGrid grid_;
  std::vector<uint64_t> offset_;       // by grid index, in its layer's buffer
  std::vector<uint64_t> layer_bytes_;
  std::vector<Buffer> layers_;
};

}  // namespace lighter::offload
