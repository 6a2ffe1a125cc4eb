// Where expert weights come from: a checkpoint, or a generator. The executors load through it, so that
// offload/ knows no checkpoint and models/ no residency.
#pragma once

#include <cstddef>
#include <span>

#include "runtime/moe/expert_id.h"

namespace lighter {

class SliceSource {
 public:
  virtual ~SliceSource() = default;

  // Writes all packed slices of one expert (see runtime/moe/slice_format.h); slices[i] has slice_bytes.
  // Thread-safe; uses a bounded scratch of its own. Throws CheckpointError.
  virtual void read_expert(ExpertId expert, std::span<std::byte* const> slices) const = 0;
};

}  // namespace lighter
