#include "offload/team_layers.h"

#include <algorithm>
#include <string>

#include "runtime/error.h"
#include "runtime/quant/packed_slice.h"

namespace lighter::offload {

void TeamLayers::reset(int64_t hidden_values, bool one) {
  hidden_values_ = hidden_values;
  one_ = one;
  for (Holder& holder : holders_) {
    for (auto& held : holder.held) held = nullptr;
  }
  for (TeamLayer& place : places_) {
    place.number = 0;
    place.complete = true;
    for (TeamLayer::Hidden& hidden : place.hidden) hidden.layer = 0;
  }
  for (auto& recent : recent_) recent = 0;
  for (uint64_t number = 1; number <= (one ? 1 : kAhead); ++number) make_place(number);
}

TeamLayer* TeamLayers::hold(int holder, uint64_t number) {
  auto& held = holders_[holder].held[number % 2];
  held.store(nullptr, std::memory_order_release);
  const uint64_t known = recent(number).load(std::memory_order_acquire);
  if (known >> kPlaceBits != number) return nullptr;
  // Whoever wants the place looks for holders after having taken its number away.
  TeamLayer& place = places_[known & ((1u << kPlaceBits) - 1)];
  held.store(&place, std::memory_order_seq_cst);
  if (place.number.load(std::memory_order_seq_cst) == number) return &place;
  held.store(nullptr, std::memory_order_release);
  return nullptr;
}

void TeamLayers::release(int holder, uint64_t number) {
  holders_[holder].held[number % 2].store(nullptr, std::memory_order_release);
}

bool TeamLayers::over(uint64_t number) const {
  const uint64_t known = recent(number).load(std::memory_order_seq_cst);
  if (known >> kPlaceBits != number) return known >> kPlaceBits > number;
  const TeamLayer& place = places_[known & ((1u << kPlaceBits) - 1)];
  const bool complete = place.complete.load(std::memory_order_seq_cst);
  return complete || place.number.load(std::memory_order_seq_cst) != number;
}

void TeamLayers::complete(TeamLayer& layer) {
  const uint64_t number = layer.number.load(std::memory_order_relaxed);
  layer.complete.store(true, std::memory_order_seq_cst);
  if (!one_) make_place(number + kAhead);
}

bool TeamLayers::is_held(const TeamLayer& layer) const {
  return std::any_of(holders_.begin(), holders_.end(), [&](const Holder& holder) {
    return holder.held[0].load(std::memory_order_seq_cst) == &layer ||
           holder.held[1].load(std::memory_order_seq_cst) == &layer;
  });
}

void TeamLayers::make_place(uint64_t number) {
  constexpr int64_t fewest = group_size(SliceEncoding::int4);  // hidden values of a job
  for (size_t i = 0; i < places_.size(); ++i) {
    TeamLayer& place = places_[i];
    uint64_t before = place.number.load(std::memory_order_acquire);
    if (before == kNobody || !place.complete.load(std::memory_order_acquire)) continue;
    if (!place.number.compare_exchange_strong(before, kNobody, std::memory_order_seq_cst)) continue;
    if (is_held(place)) {
      place.number.store(before, std::memory_order_release);
      continue;
    }
    if (static_cast<int64_t>(place.values.size()) < hidden_values_) {
      place.values.resize(hidden_values_);
      place.hidden.resize(static_cast<size_t>(hidden_values_ / fewest));
    }
    // A run that was abandoned leaves some behind.
    for (TeamLayer::Hidden& hidden : place.hidden) hidden.computed.store(0, std::memory_order_relaxed);
    for (TeamLayer::Claims* claims : {&place.known, &place.expected}) {
      claims->gate_up.begin(static_cast<int>(holders_.size()));
      claims->down.begin(static_cast<int>(holders_.size()));
    }
    place.rows_done.store(0, std::memory_order_relaxed);
    place.complete.store(false, std::memory_order_release);
    place.number.store(number, std::memory_order_release);
    recent(number).store(number << kPlaceBits | i, std::memory_order_seq_cst);
    return;
  }
  throw DeviceError("no place is free for layer " + std::to_string(number) + " of the CPU's experts");
}

}  // namespace lighter::offload
