#include "offload/slice_pager.h"

#include <algorithm>
#include <cmath>

#include "runtime/device/near_pages.h"
#include "runtime/error.h"

namespace lighter::offload {

namespace {

constexpr int kMaxPrefetchesInFlight = 64;

std::vector<bool> pinned_experts(const ExpertGrid& grid, const PagerOptions& options) {
  std::vector<bool> pinned(static_cast<size_t>(grid.layers) * grid.experts);
  for (const ExpertId id : options.pinned)
    pinned[static_cast<size_t>(id.layer) * grid.experts + id.expert] = true;
  return pinned;
}

}  // namespace

InitialResidency initial_residency(const ExpertGrid& grid, const PagerOptions& options) {
  const std::vector<bool> pinned = pinned_experts(grid, options);
  InitialResidency result;
  result.layers.resize(grid.layers);
  result.pinned.resize(grid.total_slices());
  result.has_home.assign(grid.total_slices(), true);
  for (int layer = 0; layer < grid.layers; ++layer) {
    const auto capacity = static_cast<size_t>(options.residents_per_layer[layer]);
    auto& chosen = result.layers[layer];
    const auto is_pinned = [&](int expert) {
      return pinned[static_cast<size_t>(layer) * grid.experts + expert];
    };
    for (int expert = 0; expert < grid.experts; ++expert) {
      if (!is_pinned(expert)) continue;
      for (int i = 0; i < grid.slices; ++i) {
        chosen.push_back({layer, expert, i});
        result.pinned[grid.index(chosen.back())] = true;
      }
    }
    if (chosen.size() > capacity) {
      throw CapacityError("offload.pin asks for " + std::to_string(chosen.size()) + " slices of MoE layer " +
                          std::to_string(layer) + ", but " + std::to_string(capacity) +
                          " can be resident there; pin fewer experts or raise offload.resident or "
                          "memory.gpu_budget");
    }
    // Stripes: a slice of every expert, then the next one, … Of those that are left out, the link brings the
    // first ones and the CPU computes the last ones, so that each has the pages of the store that suit it.
    const size_t striped_experts = static_cast<size_t>(grid.experts) - chosen.size() / grid.slices;
    const size_t stripes =
        striped_experts == 0 ? 0 : (capacity - chosen.size() + striped_experts - 1) / striped_experts;
    const int left_out = std::max(0, grid.slices - static_cast<int>(stripes));
    for (int i = static_cast<int>(left_out * kFarShare); i < grid.slices && chosen.size() < capacity; ++i) {
      for (int expert = 0; expert < grid.experts && chosen.size() < capacity; ++expert) {
        if (!is_pinned(expert)) chosen.push_back({layer, expert, i});
      }
    }
    const bool stays_for_ever =
        options.policy == PolicyKind::static_ || chosen.size() == grid.slices_per_layer();
    std::vector<int> homeless(grid.experts);
    for (const SliceId slice : chosen) {
      const size_t index = grid.index(slice);
      if (!stays_for_ever && !result.pinned[index]) continue;
      result.has_home[index] = false;
      result.most_homeless_of_an_expert =
          std::max(result.most_homeless_of_an_expert, ++homeless[slice.expert]);
    }
  }
  return result;
}

SlicePager::SlicePager(Device& device, const ExpertGrid& grid, const PagerOptions& options,
                       std::shared_ptr<ExpertStore> kept)
    : device_(device),
      grid_(grid),
      options_(options),
      initial_(initial_residency(grid, options)),
      store_(kept ? kept
                  : std::make_shared<ExpertStore>(device, grid, initial_.has_home, options.near_pages)),
      own_store_(!kept),
      kept_bytes_(kept ? ExpertStore(device, grid, initial_.has_home).bytes() : 0),
      slots_memory_([&] {
        size_t slots = options.spare_slots;
        for (const int residents : options.residents_per_layer) slots += residents;
        return device.allocate(slots * grid.slice_bytes, "expert slots");
      }()),
      cache_(grid, options.residents_per_layer, options.spare_slots, make_policy(options.policy, grid),
             device.index(), slots_memory_.data()),
      slot_events_(cache_.slots()),
      promoter_(cache_),
      transfers_(device) {
  device.host_budget().take(kept_bytes_, "the experts' home");
  for (auto& events : slot_events_) {
    events.ready = device.new_event();
    events.own_use = device.new_event();
    events.last_use = events.own_use.get();
  }
  for (int layer = 0; layer < grid.layers; ++layer) layer_use_.push_back(device.new_event());
  if (options.prefetch) {
    prefetcher_ = std::make_unique<Prefetcher>(
        grid, kMaxPrefetchesInFlight, [this](uint64_t step, SliceId slice, std::function<void()> ended) {
          return start_prefetch(step, slice, std::move(ended));
        });
  }
}

SlicePager::~SlicePager() {
  device_.host_budget().give_back(kept_bytes_);
  std::lock_guard lock(mutex_);
  ++step_;  // Guesses still under way now come too late.
  drop_promotions();
  for (auto& events : slot_events_) {
    if (events.prefetch) transfers_.cancel(*events.prefetch);  // Nobody waits for them any more.
  }
}

void SlicePager::visit(int layer, std::span<const int> experts, bool streaming, const LayerWork& work) {
  std::vector<SliceNeed> needs;
  std::vector<SliceId> left;
  {
    std::lock_guard lock(mutex_);
    layer_ = layer;
    drop_promotions();
    std::vector<int> dropped;
    needs = cache_.begin_layer(layer, experts, dropped);
    for (const int slot : dropped) cancel_prefetch(slot);
    for (const SliceNeed& need : needs) {
      if (need.presence != Presence::arriving) continue;
      if (auto copy = std::exchange(slot_events_[need.slot].prefetch, nullptr)) transfers_.expedite(*copy);
      if (!streaming) cache_.try_admit(need.slice);
    }
  }
  for (const SliceNeed& need : needs) {
    ++counters_.slices_used;
    counters_.slices_resident += need.presence == Presence::resident;
    counters_.slices_prefetched += need.presence == Presence::arriving;
    counters_.slices_missed += need.presence == Presence::absent;
  }
  if (work.leave) {
    const std::vector<bool> over = left_over(layer);
    std::erase_if(needs, [&](const SliceNeed& need) {
      const bool leave = need.presence == Presence::absent &&
                         over[need.slice.expert * grid_.slices + need.slice.slice] &&
                         (!work.may_leave || work.may_leave(need.slice.expert));
      if (leave) left.push_back(need.slice);
      return leave;
    });
    if (!left.empty()) work.leave(left);
  }

  size_t next_fetch = 0;
  const auto fetch_while_slots_last = [&] {
    for (; next_fetch < needs.size(); ++next_fetch) {
      if (needs[next_fetch].slot < 0 && !fetch(needs[next_fetch], !streaming)) break;
    }
  };
  fetch_while_slots_last();
  work.overlap();
  std::vector<const std::byte*> addresses;
  for (size_t begin = 0; begin < needs.size();) {
    SliceNeed& first = needs[begin];
    if (first.slot < 0) make_room_for(first, std::span(needs).subspan(begin + 1));
    // As many as have a slot by now.
    size_t end = begin;
    addresses.clear();
    const int offset = first.slice.slice - static_cast<int>(begin);
    while (end < needs.size() && needs[end].slot >= 0 && needs[end].slice.expert == first.slice.expert &&
           needs[end].slice.slice == static_cast<int>(end) + offset) {
      addresses.push_back(cache_.slot_address(needs[end++].slot));
    }
    const std::span group(needs.begin() + static_cast<ptrdiff_t>(begin), end - begin);
    wait_until_ready(group);
    work.use(first.slice.expert, first.slice.slice, addresses);
    release(group);
    begin = end;
    fetch_while_slots_last();
  }
  // One event for the layer's residents, instead of one for each.
  device_.compute_stream().record(*layer_use_[layer]);
  {
    std::lock_guard lock(mutex_);
    for (const SliceNeed& need : needs) {
      if (need.presence == Presence::resident) slot_events_[need.slot].last_use = layer_use_[layer].get();
    }
  }
  if (streaming) ran_dry_ = !copying();
  if (streaming && layer + 1 < grid_.layers) stream_ahead(layer + 1, work.leave != nullptr);
}

// The slices of a layer that the device's share of the absent ones does not cover, by their place in the
// layer.
std::vector<bool> SlicePager::left_over(int layer) const {
  std::vector<bool> over(grid_.slices_per_layer());
  const ResidencyVersion residency = cache_.residency();
  const auto absent = [&](int expert, int slice) {
    return !residency->at({layer, expert, slice}).on_device();
  };
  int64_t all = 0;
  for (int expert = 0; expert < grid_.experts; ++expert) {
    for (int i = 0; i < grid_.slices; ++i) all += absent(expert, i);
  }
  auto count = std::lround((1 - device_share_) * static_cast<double>(all));
  std::vector<int> last(grid_.experts,
                        grid_.slices);  // of each expert, from here on all absent ones are over
  for (int64_t before = -1; count > 0 && count != before;) {
    before = count;
    for (int expert = 0; expert < grid_.experts && count > 0; ++expert) {
      do --last[expert];
      while (last[expert] >= 0 && !absent(expert, last[expert]));
      if (last[expert] < 0) continue;
      over[expert * grid_.slices + last[expert]] = true;
      --count;
    }
  }
  return over;
}

void SlicePager::hint(int layer, std::vector<int> experts) {
  if (prefetcher_) prefetcher_->request(step_, layer, std::move(experts));
}

void SlicePager::count_copies() {
  transfers_.rethrow();
  const TransferCounters copied = transfers_.counters();
  counters_.demand_bytes = copied.demand_bytes;
  counters_.prefetch_bytes = copied.prefetch_bytes;
  counters_.demand_busy_s = copied.demand_busy_s;
  counters_.demand_busy_bytes = copied.demand_busy_bytes;
}

void SlicePager::between_steps() {
  count_copies();
  for (size_t i = 0; i < stalls_used_; ++i) {
    counters_.stall_s += device_.milliseconds_between(*stalls_[i].begin, *stalls_[i].end) / 1000;
  }
  stalls_used_ = 0;
  std::lock_guard lock(mutex_);
  end_step();
}

// With the lock.
void SlicePager::end_step() {
  counters_.evictions = cache_.evictions();
  cache_.end_step();
  ++step_;
  layer_ = -1;
}

void SlicePager::learn(std::span<const int> experts) {
  if (!places_stay()) promote(experts);
  count_copies();  // Afterwards, so that the copies that were just seen to have ended are among them.
}

void SlicePager::promote(std::span<const int> experts) {
  std::lock_guard lock(mutex_);
  Promoter::Copies copies;
  copies.begin = [&](SliceId slice, int slot) {
    const auto ended = std::make_shared<std::atomic<bool>>(false);
    promotions_[slice] = {transfers_.prefetch(copy_into(slot, slice), [ended] { *ended = true; }), ended};
  };
  copies.state = [&](SliceId slice) {
    const Promotion& promotion = promotions_.at(slice);
    if (!*promotion.ended) return CopyState::under_way;
    return promotion.copy->issued_bytes == grid_.slice_bytes ? CopyState::there : CopyState::lost;
  };
  copies.ended = [&](SliceId slice) { promotions_.erase(slice); };
  copies.prefetch_dropped = [&](int slot) { cancel_prefetch(slot); };
  counters_.prefetch_wasted_bytes += promoter_.learn(experts, copies) * grid_.slice_bytes;
  end_step();
}

void SlicePager::drop_promotions() {
  for (const SliceId slice : promoter_.drop()) {
    counters_.prefetch_wasted_bytes += transfers_.cancel(*promotions_.at(slice).copy);
  }
  promotions_.clear();
}

bool SlicePager::consistent() const {
  std::lock_guard lock(mutex_);
  return cache_.consistent();
}

CopyRequest SlicePager::copy_into(int slot, SliceId slice) {
  SlotEvents& events = slot_events_[slot];
  return {cache_.slot_address(slot), store_->address(slice), grid_.slice_bytes, events.last_use,
          events.ready.get()};
}

bool SlicePager::fetch(SliceNeed& need, bool admit) {
  std::lock_guard lock(mutex_);
  bool stolen = false;
  const auto slot = cache_.take(need.slice, stolen);
  if (!slot) return false;
  if (stolen) cancel_prefetch(*slot);
  transfers_.fetch(copy_into(*slot, need.slice));
  if (admit) cache_.try_admit(need.slice);
  need.slot = *slot;
  return true;
}

// All spare slots hold slices of this layer that come later in its order: the last of them gives way.
void SlicePager::make_room_for(SliceNeed& need, std::span<SliceNeed> later) {
  if (fetch(need, false)) return;
  for (size_t i = later.size(); i-- > 0;) {
    SliceNeed& other = later[i];
    if (other.presence != Presence::arriving || other.slot < 0) continue;
    {
      std::lock_guard lock(mutex_);
      if (!cache_.give_up(other.slice)) continue;
    }
    counters_.prefetch_wasted_bytes += grid_.slice_bytes;
    other.slot = -1;
    if (fetch(need, false)) return;
  }
  throw CapacityError("no slot is left for a slice of MoE layer " + std::to_string(need.slice.layer) + "; " +
                      std::to_string(cache_.spare_slots()) + " spare slots are too few");
}

void SlicePager::cancel_prefetch(int slot) {
  auto copy = std::exchange(slot_events_[slot].prefetch, nullptr);
  counters_.prefetch_wasted_bytes += copy ? transfers_.cancel(*copy) : grid_.slice_bytes;
}

void SlicePager::wait_until_ready(std::span<const SliceNeed> needs) {
  Stream& compute = device_.compute_stream();
  Stall* stall = nullptr;
  for (const SliceNeed& need : needs) {
    if (need.presence == Presence::resident) continue;
    const Event& ready = *slot_events_[need.slot].ready;
    if (stall == nullptr && !ready.passed()) {
      if (stalls_used_ == stalls_.size()) stalls_.push_back({device_.new_event(), device_.new_event()});
      stall = &stalls_[stalls_used_++];
      compute.record(*stall->begin);
    }
    compute.wait(ready);
  }
  if (stall != nullptr) compute.record(*stall->end);
}

void SlicePager::release(std::span<const SliceNeed> needs) {
  std::lock_guard lock(mutex_);
  for (const SliceNeed& need : needs) {
    if (need.presence == Presence::resident) continue;
    SlotEvents& events = slot_events_[need.slot];
    device_.compute_stream().record(*events.own_use);
    events.last_use = events.own_use.get();
    cache_.release(need.slice);
  }
}

void SlicePager::stream_ahead(int layer, bool leaving) {
  std::lock_guard lock(mutex_);
  const std::vector<bool> over = leaving ? left_over(layer) : std::vector<bool>(grid_.slices_per_layer());
  for (size_t i = 0; i < grid_.slices_per_layer(); ++i) {
    if (over[i]) continue;
    const SliceId slice{layer, static_cast<int>(i) / grid_.slices, static_cast<int>(i) % grid_.slices};
    if (cache_.free_slots() == 0) return;
    if (const auto slot = cache_.take_for_prefetch(slice)) transfers_.fetch(copy_into(*slot, slice));
  }
}

bool SlicePager::start_prefetch(uint64_t step, SliceId slice, std::function<void()> ended) {
  std::lock_guard lock(mutex_);
  if (step != step_ || slice.layer <= layer_) return false;  // The guess comes too late.
  const auto slot = cache_.take_for_prefetch(slice);
  if (!slot) return false;
  slot_events_[*slot].prefetch = transfers_.prefetch(copy_into(*slot, slice), std::move(ended));
  return true;
}

}  // namespace lighter::offload
