// Which slice leaves the device when another comes.
//
// Pure values in, values out: no threads, clocks or tensors; time is the number of the step. A policy sees
// experts rather than slices, because the slices of an expert are always used together. Residency has a fixed
// number of slots per layer, so incoming and candidates are of one layer. Not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>

#include "runtime/moe/expert_id.h"

namespace lighter::offload {

enum class PolicyKind { static_, lru, lfu };

class EvictionPolicy {
 public:
  virtual ~EvictionPolicy() = default;

  // The step used this expert, resident or not. Steps never go back.
  virtual void touch(ExpertId expert, uint64_t step) = 0;

  // The candidate to evict for `incoming`, as an index, or nothing when it is better not to admit it.
  // candidates: resident, not pinned, and not used by this step.
  virtual std::optional<size_t> victim(ExpertId incoming, std::span<const SliceId> candidates) const = 0;
};

// static: what is resident stays. lru: the least recently used goes. lfu: the least often used goes, where a
// use counts half after every 256 steps; what is used less than all residents is not admitted.
std::unique_ptr<EvictionPolicy> make_policy(PolicyKind kind, const ExpertGrid& grid);

}  // namespace lighter::offload
