#include "offload/replay.h"

#include <algorithm>
#include <cmath>

#include "offload/expert_cache.h"
#include "offload/promoter.h"
#include "offload/slice_pager.h"

namespace lighter::offload {
namespace {

std::vector<int> ascending_experts(const Trace& trace, size_t token, int layer) {
  const auto chosen = trace.experts(token, layer);
  std::vector<int> experts(chosen.begin(), chosen.end());
  std::sort(experts.begin(), experts.end());
  return experts;
}

// SlicePager::visit without the bytes: every copy ends before it is needed.
class CacheRun {
 public:
  CacheRun(const Trace& trace, const std::vector<int>& residents_per_layer, PolicyKind policy, int depth)
      : trace_(trace),
        grid_([&] {
          ExpertGrid grid = trace.header().grid();
          grid.slice_bytes = 0;  // There is no memory behind the slots.
          return grid;
        }()),
        depth_(depth),
        cache_(grid_, residents_per_layer, (2 + depth) * trace.header().experts_per_token * grid_.slices,
               make_policy(policy, grid_), 0, nullptr) {
    PagerOptions options;
    options.residents_per_layer = residents_per_layer;
    options.policy = policy;
    for (const auto& layer : initial_residency(grid_, options).layers) {
      for (const SliceId slice : layer) cache_.place(slice, false);
    }
    cache_.end_step();
  }

  void step(size_t token) {
    for (int layer = 0; layer < grid_.layers; ++layer) {
      if (depth_ > 0) guess(token, layer);
      visit(layer, ascending_experts(trace_, token, layer));
    }
    cache_.end_step();
  }

  void step_behind(size_t token) {
    std::vector<int> chosen;
    const ResidencyVersion residency = cache_.residency();
    for (int layer = 0; layer < grid_.layers; ++layer) {
      for (const int expert : ascending_experts(trace_, token, layer)) {
        chosen.push_back(expert);
        for (int i = 0; i < grid_.slices; ++i) {
          ++counts_.used;
          ++(residency->at({layer, expert, i}).on_device() ? counts_.resident : counts_.missed);
        }
      }
    }
    Promoter::Copies copies;
    copies.begin = [&](SliceId, int) { ++counts_.promoted; };
    copies.state = [](SliceId) { return CopyState::there; };
    copies.ended = [](SliceId) {};
    copies.prefetch_dropped = [](int) {};
    promoter_.learn(chosen, copies);
    cache_.end_step();
  }

  const ReplayCounts& counts() const { return counts_; }

 private:
  void guess(size_t token, int from) {
    const auto& layers = trace_.header().layers;
    const auto ahead = std::lower_bound(layers.begin(), layers.end(), layers[from] + depth_);
    if (ahead == layers.end() || *ahead != layers[from] + depth_) return;
    const int layer = static_cast<int>(ahead - layers.begin());
    for (const int expert :
         top_experts(trace_.guess_logits(token, layer, depth_), trace_.header().experts_per_token)) {
      for (int i = 0; i < grid_.slices; ++i) cache_.take_for_prefetch({layer, expert, i});
    }
  }

  void visit(int layer, const std::vector<int>& experts) {
    std::vector<int> dropped;
    std::vector<SliceNeed> needs = cache_.begin_layer(layer, experts, dropped);
    counts_.wasted += dropped.size();
    for (const SliceNeed& need : needs) {
      ++counts_.used;
      counts_.resident += need.presence == Presence::resident;
      counts_.prefetched += need.presence == Presence::arriving;
      counts_.missed += need.presence == Presence::absent;
      if (need.presence == Presence::arriving) cache_.try_admit(need.slice);
    }
    for (SliceNeed& need : needs) {
      if (need.presence != Presence::absent) continue;
      bool stolen = false;
      need.slot = cache_.take(need.slice, stolen).value();
      counts_.wasted += stolen;
      cache_.try_admit(need.slice);
    }
    for (const SliceNeed& need : needs) {
      if (need.presence != Presence::resident) cache_.release(need.slice);
    }
  }

  const Trace& trace_;
  const ExpertGrid grid_;
  const int depth_;
  ExpertCache cache_;
  Promoter promoter_{cache_};
  ReplayCounts counts_;
};

template <typename Step>
ReplayResult all_tokens(const Trace& trace, CacheRun& run, const Step& step) {
  ReplayCounts first_half;
  for (size_t token = 0; token < trace.tokens(); ++token) {
    if (token == trace.tokens() / 2) first_half = run.counts();
    step(token);
  }
  return {run.counts(), run.counts() - first_half};
}

template <typename Named>
GuessQuality overlap(const Trace& trace, Named named) {
  const int layers = trace.header().grid().layers;
  const int k = trace.header().experts_per_token;
  GuessQuality quality;
  quality.layers.resize(layers);
  uint64_t all_right = 0;
  uint64_t all_asked = 0;
  for (int layer = 0; layer < layers; ++layer) {
    uint64_t right = 0;
    uint64_t asked = 0;
    for (size_t token = 0; token < trace.tokens(); ++token) {
      const std::vector<int> guess = named(token, layer);
      if (guess.empty()) continue;
      asked += k;
      for (const int expert : trace.experts(token, layer)) {
        right += std::find(guess.begin(), guess.end(), expert) != guess.end();
      }
    }
    if (asked > 0) quality.layers[layer] = static_cast<double>(right) / static_cast<double>(asked);
    all_right += right;
    all_asked += asked;
  }
  quality.all = all_asked == 0 ? 0 : static_cast<double>(all_right) / static_cast<double>(all_asked);
  return quality;
}

}  // namespace

ReplayCounts ReplayCounts::operator-(const ReplayCounts& before) const {
  ReplayCounts d = *this;
  d.used -= before.used;
  d.resident -= before.resident;
  d.prefetched -= before.prefetched;
  d.missed -= before.missed;
  d.wasted -= before.wasted;
  d.promoted -= before.promoted;
  return d;
}

std::vector<int> residents_for(const ExpertGrid& grid, double share) {
  return std::vector<int>(
      grid.layers, static_cast<int>(std::lround(share * static_cast<double>(grid.slices_per_layer()))));
}

ReplayResult replay(const Trace& trace, const std::vector<int>& residents_per_layer, PolicyKind policy,
                    int prefetch_depth) {
  CacheRun run(trace, residents_per_layer, policy, prefetch_depth);
  return all_tokens(trace, run, [&](size_t token) { run.step(token); });
}

ReplayResult replay_behind(const Trace& trace, const std::vector<int>& residents_per_layer,
                           PolicyKind policy) {
  CacheRun run(trace, residents_per_layer, policy, 0);
  return all_tokens(trace, run, [&](size_t token) { run.step_behind(token); });
}

std::vector<int> top_experts(std::span<const uint16_t> logits, int k) {
  // Comparable without conversion: the magnitude's bits grow with it, and the sign turns their order.
  const auto key = [&](int expert) {
    const int bits = logits[expert];
    return (bits & 0x8000) != 0 ? -(bits & 0x7FFF) : bits;
  };
  std::vector<int> experts;
  for (int place = 0; place < k && !logits.empty(); ++place) {
    int best = -1;
    for (int expert = 0; expert < static_cast<int>(logits.size()); ++expert) {
      if (std::find(experts.begin(), experts.end(), expert) != experts.end()) continue;
      if (best < 0 || key(expert) > key(best)) best = expert;
    }
    experts.push_back(best);
  }
  return experts;
}

GuessQuality guess_overlap(const Trace& trace, int depth) {
  return overlap(trace, [&](size_t token, int layer) {
    return top_experts(trace.guess_logits(token, layer, depth), trace.header().experts_per_token);
  });
}

GuessQuality repeat_overlap(const Trace& trace) {
  return overlap(trace, [&](size_t token, int layer) {
    return trace.position(token) == 0 ? std::vector<int>() : ascending_experts(trace, token - 1, layer);
  });
}

}  // namespace lighter::offload
