#include "offload/expert_store.h"

#include <cstring>
#include <numeric>

namespace lighter::offload {

ExpertStore::ExpertStore(Device& device, const ExpertGrid& grid, const std::vector<bool>& has_home,
                         bool near_last)
    : device_(device),
      grid_(grid),
      near_last_(near_last),
      offset_(grid.total_slices(), kNone),
      layer_bytes_(grid.layers) {
  for (int layer = 0; layer < grid.layers; ++layer) {
    for (int slice = 0; slice < grid.slices; ++slice) {
      for (int expert = 0; expert < grid.experts; ++expert) {
        const size_t i = grid.index({layer, expert, slice});
        if (!has_home[i]) continue;
        offset_[i] = layer_bytes_[layer];
        layer_bytes_[layer] += grid.slice_bytes;
      }
    }
  }
}

void ExpertStore::allocate(const Progress& progress) {
  layers_.clear();
  layers_ = device_.allocate_host_parts(layer_bytes_, "the experts' home", near_last_, progress);
}

std::byte* ExpertStore::address(SliceId slice) const {
  const uint64_t offset = offset_[grid_.index(slice)];
  return offset == kNone ? nullptr : layers_[slice.layer].data() + offset;
}

uint64_t ExpertStore::bytes() const {
  return std::accumulate(layer_bytes_.begin(), layer_bytes_.end(), uint64_t{0});
}

void ExpertStore::read_expert(ExpertId expert, std::span<std::byte* const> slices) const {
  for (int i = 0; i < grid_.slices; ++i) {
    std::memcpy(slices[i], address({expert.layer, expert.expert, i}), grid_.slice_bytes);
  }
}

}  // namespace lighter::offload
