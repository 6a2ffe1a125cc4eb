// The experts' home in host memory, page-locked, one buffer per layer, in which first slices of all
// experts come first, then all second ones, …: an expert's slices are read at the same time, and memory
// answers faster where they lie far apart. Slices that never leave the device have no home: nothing keeps a
// second copy of them. A store in which every slice has a home can outlive the pager that filled it and serve
// the next one, whatever that has resident.
#pragma once

#include <vector>

#include "runtime/device/device.h"
#include "runtime/moe/expert_id.h"
#include "runtime/moe/slice_source.h"

namespace lighter::offload {

class ExpertStore : public SliceSource {
 public:
  // has_home: by grid index. near_last: the CPU computes what is missed of an expert's last slices, so near
  // pages are for them; see Device::allocate_host_parts(). Allocates nothing yet.
  ExpertStore(Device& device, const ExpertGrid& grid, const std::vector<bool>& has_home,
              bool near_last = false);
  // Every slice has a home.
  ExpertStore(Device& device, const ExpertGrid& grid, bool near_last = false)
      : ExpertStore(device, grid, std::vector<bool>(grid.total_slices(), true), near_last) {}

  // Before anything is written. Throws CapacityError, DeviceError, and what progress throws.
  void allocate(const Progress& progress);

  bool has_home(SliceId slice) const { return offset_[grid_.index(slice)] != kNone; }
  // The slice's home; null when it has none. Of an allocated store.
  std::byte* address(SliceId slice) const;
  uint64_t bytes() const;

  // Whether all homes hold their slices: said by who wrote them.
  bool filled() const { return filled_; }
  void set_filled() { filled_ = true; }
  // Of a filled store where every slice has a home.
  void read_expert(ExpertId expert, std::span<std::byte* const> slices) const override;

 private:
  static constexpr uint64_t kNone = ~uint64_t{0};

  Device& device_;
  const ExpertGrid grid_;
  const bool near_last_;
  std::vector<uint64_t> offset_;  // by grid index, in its layer's buffer
  std::vector<uint64_t> layer_bytes_;
  std::vector<Buffer> layers_;
  bool filled_ = false;
};

}  // namespace lighter::offload
