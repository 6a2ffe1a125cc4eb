// The book-keeping of device slots: who is in which, who may come, who must go. Moves no bytes.
//
// A slot is Free → Filling → Resident or Passing → Free:
//   Resident  listed in the residency table; readers of that version may use it
//   Passing   fetched or prefetched for one use, not admitted
//
// Every layer has a fixed number of resident slots, and a ring of spare slots serves all layers. A miss takes
// a spare slot; if the policy admits it, the evicted slice's slot becomes the spare, so admission copies
// nothing. A victim is always of the layer that is being executed and not among its routed experts: what the
// current step reads from its residency version is thereby never overwritten, although the slot is used again
// before the step has ended.
//
// Not thread-safe: SlicePager guards it with its lock.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "offload/eviction_policy.h"
#include "offload/residency_table.h"
#include "runtime/moe/expert_id.h"

namespace lighter::offload {

enum class SlotState : uint8_t { free, filling, resident, passing };

enum class Presence : uint8_t { resident, arriving, absent };

struct SliceNeed {
  SliceId slice;
  Presence presence = Presence::absent;
  int slot = -1;  // when not absent
};

class ExpertCache {
 public:
  // slot_address(i) for i < total residents + spare_slots must stay valid. spare_slots >= 1.
  ExpertCache(const ExpertGrid& grid, std::span<const int> residents_per_layer, int spare_slots,
              std::unique_ptr<EvictionPolicy> policy, int device_index, std::byte* slots_base);

  int slots() const { return static_cast<int>(slots_.size()); }
  int spare_slots() const { return spare_slots_; }
  std::byte* slot_address(int slot) const { return base_ + static_cast<size_t>(slot) * grid_.slice_bytes; }
  const ExpertGrid& grid() const { return grid_; }

  // Before the first step: gives the slice a resident slot of its layer. A pinned slice never leaves.
  // Throws CapacityError when the layer has none left.
  int place(SliceId slice, bool pinned);

  // The slices of these experts (ascending ids) in the fixed order of their sum. Slots of slices that were
  // prefetched for this layer and are not needed are freed and listed in `dropped`.
  std::vector<SliceNeed> begin_layer(int layer, std::span<const int> experts, std::vector<int>& dropped);

  // A slot for an absent slice of the layer begun. Nothing when all spare slots are in use by this layer;
  // a slot that a prefetch for a later layer holds is taken from it and named in `stolen_from_prefetch`.
  std::optional<int> take(SliceId slice, bool& stolen_from_prefetch);
  // Whether the policy would admit a slice of the layer begun.
  bool would_admit(SliceId slice) const { return policy_->victim(slice.owner(), candidates_).has_value(); }
  // Lets the policy admit a slice of the layer begun whose slot was taken or prefetched: its slot becomes
  // resident and the victim's becomes spare. Whether it did.
  bool try_admit(SliceId slice);
  // The slice's last use in this step has been queued: a slot that was not admitted is free again.
  void release(SliceId slice);

  // Takes back the slot of an arriving slice that must make room for an earlier one of its layer; false when
  // it has been admitted.
  bool give_up(SliceId slice);

  // For a slice that a coming layer may need; nothing when it is present or no slot is idle.
  std::optional<int> take_for_prefetch(SliceId slice);

  void touch(ExpertId expert) { policy_->touch(expert, step_); }

  // Publishes what changed in this step as a new version.
  ResidencyVersion end_step();
  ResidencyVersion residency() const { return published_; }
  int free_slots() const { return static_cast<int>(free_.size()); }
  uint64_t evictions() const { return evictions_; }
  // Every slot is in exactly one place and agrees with what is said to be there. For tests.
  bool consistent() const;

 private:
  struct Slot {
    SlotState state = SlotState::free;
    SliceId slice;
    bool pinned = false;
    bool prefetched = false;  // passing or filling on behalf of a layer not yet begun
  };

  int& slot_of(SliceId slice) { return slot_of_[grid_.index(slice)]; }
  void free_slot(int slot);

  const ExpertGrid grid_;
  const int spare_slots_;
  const int device_index_;
  std::byte* const base_;
  std::unique_ptr<EvictionPolicy> policy_;
  std::vector<Slot> slots_;
  std::vector<int> slot_of_;                // by grid index; -1: on the host only
  std::deque<int> free_;                    // oldest first: its last reader is the likeliest to have finished
  std::vector<std::vector<int>> unplaced_;  // per layer, before the first step
  std::vector<std::vector<int>> residents_;  // per layer: slots
  std::vector<int> prefetched_;              // slots
  ResidencyVersion published_;
  bool changed_ = true;
  uint64_t step_ = 0;
  int layer_ = -1;
  std::vector<bool> routed_;         // by expert, of the layer begun
  std::vector<SliceId> candidates_;  // for eviction in the layer begun
  uint64_t evictions_ = 0;
};

}  // namespace lighter::offload
