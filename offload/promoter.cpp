#include "offload/promoter.h"

#include <algorithm>
#include <utility>

namespace lighter::offload {

int Promoter::learn(std::span<const int> experts, const Copies& copies) {
  const int layers = cache_.grid().layers;
  const size_t k = experts.size() / layers;
  if (++steps_ % kLearningSteps != 0) {
    for (size_t i = 0; i < experts.size(); ++i) cache_.touch({static_cast<int>(i / k), experts[i]});
    return 0;
  }
  int left = kMostPromotions, next = first_layer_, wasted = 0;
  for (int i = 0; i < layers; ++i) {
    const int layer = (first_layer_ + i) % layers;
    wasted += visit(layer, experts.subspan(layer * k, k), left, copies);
    if (left > 0 && cache_.free_slots() > 0) next = (layer + 1) % layers;
  }
  first_layer_ = next;
  return wasted;
}

int Promoter::visit(int layer, std::span<const int> experts, int& left, const Copies& copies) {
  std::vector<int> chosen(experts.begin(), experts.end());
  std::sort(chosen.begin(), chosen.end());
  std::vector<int> dropped;
  const std::vector<SliceNeed> needs = cache_.begin_layer(layer, chosen, dropped);
  for (const int slot : dropped) copies.prefetch_dropped(slot);
  int wasted = 0;
  std::erase_if(under_way_, [&](SliceId slice) {
    if (slice.layer != layer) return false;
    const CopyState state = copies.state(slice);
    if (state == CopyState::under_way) return false;
    if (state == CopyState::lost || !cache_.try_admit(slice)) {
      cache_.release(slice);
      ++wasted;
    }
    copies.ended(slice);
    return true;
  });
  for (const SliceNeed& need : needs) {
    if (need.presence != Presence::absent) continue;
    if (left == 0 || cache_.free_slots() == 0 || !cache_.would_admit(need.slice)) break;
    bool stolen = false;
    copies.begin(need.slice, *cache_.take(need.slice, stolen));
    under_way_.push_back(need.slice);
    --left;
  }
  return wasted;
}

std::vector<SliceId> Promoter::drop() {
  for (const SliceId slice : under_way_) cache_.release(slice);
  return std::exchange(under_way_, {});
}

}  // namespace lighter::offload
