#include "offload/expert_cache.h"

#include <algorithm>

#include "runtime/error.h"

namespace lighter::offload {

ExpertCache::ExpertCache(const ExpertGrid& grid, std::span<const int> residents_per_layer, int spare_slots,
                         std::unique_ptr<EvictionPolicy> policy, int device_index, std::byte* slots_base)
    : grid_(grid),
      spare_slots_(spare_slots),
      device_index_(device_index),
      base_(slots_base),
      policy_(std::move(policy)),
      slot_of_(grid.total_slices(), -1),
      unplaced_(grid.layers),
      residents_(grid.layers),
      routed_(grid.experts) {
  int next = 0;
  for (int layer = 0; layer < grid.layers; ++layer) {
    for (int i = 0; i < residents_per_layer[layer]; ++i) unplaced_[layer].push_back(next++);
    std::reverse(unplaced_[layer].begin(), unplaced_[layer].end());
  }
  for (int i = 0; i < spare_slots; ++i) free_.push_back(next++);
  slots_.resize(next);
  end_step();
}

int ExpertCache::place(SliceId slice, bool pinned) {
  auto& unplaced = unplaced_[slice.layer];
  if (unplaced.empty()) {
    throw CapacityError("layer " + std::to_string(slice.layer) + " has no resident slot left for slice " +
                        std::to_string(slice.slice) + " of expert " + std::to_string(slice.expert));
  }
  const int slot = unplaced.back();
  unplaced.pop_back();
  slots_[slot] = {SlotState::resident, slice, pinned, false};
  slot_of(slice) = slot;
  residents_[slice.layer].push_back(slot);
  changed_ = true;
  return slot;
}

std::vector<SliceNeed> ExpertCache::begin_layer(int layer, std::span<const int> experts,
                                                std::vector<int>& dropped) {
  layer_ = layer;
  std::fill(routed_.begin(), routed_.end(), false);
  std::vector<SliceNeed> needs;
  needs.reserve(experts.size() * grid_.slices);
  for (const int expert : experts) {
    routed_[expert] = true;
    policy_->touch({layer, expert}, step_);
    for (int i = 0; i < grid_.slices; ++i) {
      const SliceId slice{layer, expert, i};
      const SliceLocation& location = published_->at(slice);
      if (location.on_device()) {
        needs.push_back({slice, Presence::resident, location.slot});
      } else if (const int slot = slot_of(slice); slot >= 0) {
        slots_[slot].prefetched = false;
        needs.push_back({slice, Presence::arriving, slot});
      } else {
        needs.push_back({slice, Presence::absent, -1});
      }
    }
  }
  // What was prefetched for this layer (or, where a step broke off, for an earlier one) and is not needed
  // goes.
  std::erase_if(prefetched_, [&](int slot) {
    if (!slots_[slot].prefetched) return true;
    if (slots_[slot].slice.layer > layer) return false;
    dropped.push_back(slot);
    free_slot(slot);
    return true;
  });
  candidates_.clear();
  for (const int slot : residents_[layer]) {
    if (!slots_[slot].pinned && !routed_[slots_[slot].slice.expert])
      candidates_.push_back(slots_[slot].slice);
  }
  return needs;
}

std::optional<int> ExpertCache::take(SliceId slice, bool& stolen_from_prefetch) {
  stolen_from_prefetch = false;
  int slot = -1;
  if (!free_.empty()) {
    slot = free_.front();
    free_.pop_front();
  } else {
    // The demand of this layer comes before the guess for a later one: the latest guess gives way.
    while (!prefetched_.empty() && !slots_[prefetched_.back()].prefetched) prefetched_.pop_back();
    if (prefetched_.empty()) return std::nullopt;
    slot = prefetched_.back();
    prefetched_.pop_back();
    slot_of(slots_[slot].slice) = -1;
    stolen_from_prefetch = true;
  }
  slots_[slot] = {SlotState::filling, slice, false, false};
  slot_of(slice) = slot;
  return slot;
}

bool ExpertCache::try_admit(SliceId slice) {
  const auto chosen = policy_->victim(slice.owner(), candidates_);
  if (!chosen) return false;
  const SliceId victim = candidates_[*chosen];
  candidates_[*chosen] = candidates_.back();
  candidates_.pop_back();

  const int incoming = slot_of(slice);
  const int outgoing = slot_of(victim);
  auto& residents = residents_[layer_];
  *std::find(residents.begin(), residents.end(), outgoing) = incoming;
  slots_[incoming].state = SlotState::resident;
  free_slot(outgoing);
  ++evictions_;
  changed_ = true;
  return true;
}

void ExpertCache::release(SliceId slice) {
  const int slot = slot_of(slice);
  if (slots_[slot].state != SlotState::resident) free_slot(slot);
}

bool ExpertCache::give_up(SliceId slice) {
  const int slot = slot_of(slice);
  if (slots_[slot].state == SlotState::resident) return false;
  free_slot(slot);
  return true;
}

std::optional<int> ExpertCache::take_for_prefetch(SliceId slice) {
  if (free_.empty() || slot_of(slice) >= 0) return std::nullopt;
  const int slot = free_.front();
  free_.pop_front();
  slots_[slot] = {SlotState::passing, slice, false, true};
  slot_of(slice) = slot;
  prefetched_.push_back(slot);
  return slot;
}

void ExpertCache::free_slot(int slot) {
  slot_of(slots_[slot].slice) = -1;
  slots_[slot] = {};
  free_.push_back(slot);
}

ResidencyVersion ExpertCache::end_step() {
  layer_ = -1;
  ++step_;
  if (!changed_) return published_;
  auto table = std::make_shared<ResidencyTable>();
  table->version = published_ == nullptr ? 0 : published_->version + 1;
  table->grid = grid_;
  table->locations.resize(grid_.total_slices());
  for (const auto& layer : residents_) {
    for (const int slot : layer) {
      table->locations[grid_.index(slots_[slot].slice)] = {static_cast<int16_t>(device_index_), slot,
                                                           slot_address(slot)};
    }
  }
  published_ = std::move(table);
  changed_ = false;
  return published_;
}

bool ExpertCache::consistent() const {
  std::vector<int> seen(slots_.size(), 0);
  for (const int slot : free_) {
    if (slots_[slot].state != SlotState::free) return false;
    ++seen[slot];
  }
  for (size_t i = 0; i < slot_of_.size(); ++i) {
    const int slot = slot_of_[i];
    if (slot < 0) continue;
    if (slots_[slot].state == SlotState::free || grid_.index(slots_[slot].slice) != i) return false;
    ++seen[slot];
  }
  for (const auto& layer : unplaced_) {
    for (const int slot : layer) ++seen[slot];
  }
  auto residents = std::count_if(slots_.begin(), slots_.end(),
                                 [](const Slot& slot) { return slot.state == SlotState::resident; });
  for (int layer = 0; layer < grid_.layers; ++layer) {
    for (const int slot : residents_[layer]) {
      if (slots_[slot].state != SlotState::resident || slots_[slot].slice.layer != layer) return false;
      --residents;
    }
  }
  if (residents != 0) return false;
  return std::all_of(seen.begin(), seen.end(), [](int count) { return count == 1; });
}

}  // namespace lighter::offload
