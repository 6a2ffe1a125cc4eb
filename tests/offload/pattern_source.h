// Expert weights that can be recognised: every slice has random bytes of its own, so a slice in the wrong
// place, a half-copied one and a stale one all show. Thread-safe after construction.
#pragma once

#include <cstring>
#include <random>
#include <span>
#include <vector>

#include "runtime/moe/slice_source.h"

namespace lighter::offload {

class PatternSource : public SliceSource {
 public:
  explicit PatternSource(const ExpertGrid& grid) : grid_(grid), bytes_(grid.total_bytes()) {
    std::mt19937_64 random(grid.total_bytes());
    for (size_t i = 0; i < bytes_.size(); i += 8) {
      const uint64_t word = random();
      std::memcpy(&bytes_[i], &word, std::min<size_t>(8, bytes_.size() - i));
    }
  }

  void read_expert(ExpertId expert, std::span<std::byte* const> slices) const override {
    for (int i = 0; i < grid_.slices; ++i) {
      std::memcpy(slices[i], original({expert.layer, expert.expert, i}), grid_.slice_bytes);
    }
  }

  const std::byte* original(SliceId slice) const { return &bytes_[grid_.index(slice) * grid_.slice_bytes]; }
  bool matches(SliceId slice, const std::byte* at) const {
    return std::memcmp(original(slice), at, grid_.slice_bytes) == 0;
  }

 private:
  const ExpertGrid grid_;
  std::vector<std::byte> bytes_;
};

}  // namespace lighter::offload
