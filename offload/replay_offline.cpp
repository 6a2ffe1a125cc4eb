// The replays that no policy can be: those that have seen the trace before.
#include <algorithm>
#include <numeric>

#include "offload/replay.h"
#include "offload/slice_pager.h"

namespace lighter::offload {
namespace {

// Slices of an expert are always used together, so only how many of them are resident matters.
using SlicesOf = std::vector<int>;  // by expert

std::vector<SlicesOf> striped(const ExpertGrid& grid, const std::vector<int>& residents_per_layer) {
  PagerOptions options;
  options.residents_per_layer = residents_per_layer;
  std::vector<SlicesOf> resident(grid.layers, SlicesOf(grid.experts));
  for (const auto& layer : initial_residency(grid, options).layers) {
    for (const SliceId slice : layer) ++resident[slice.layer][slice.expert];
  }
  return resident;
}

void count(ReplayCounts& counts, const ExpertGrid& grid, int resident) {
  counts.used += grid.slices;
  counts.resident += resident;
  counts.missed += grid.slices - resident;
}

class ClairvoyantLayer {
 public:
  ClairvoyantLayer(const Trace& trace, int layer, SlicesOf resident)
      : trace_(trace),
        grid_(trace.header().grid()),
        layer_(layer),
        resident_(std::move(resident)),
        coming_(grid_.experts),
        next_(grid_.experts) {
    for (size_t token = 0; token < trace.tokens(); ++token) {
      for (const int expert : trace.experts(token, layer)) coming_[expert].push_back(token);
    }
  }

  void step(size_t token, ReplayCounts& counts) {
    const auto chosen = trace_.experts(token, layer_);
    for (const int expert : chosen) {
      count(counts, grid_, resident_[expert]);
      ++next_[expert];
    }
    for (const int expert : chosen) admit(expert);
  }

 private:
  size_t next_use(int expert) const {
    return next_[expert] < coming_[expert].size() ? coming_[expert][next_[expert]] : trace_.tokens();
  }

  // Afterwards the residents are those of before and of this expert that are needed soonest, in whatever
  // order a token's experts come.
  void admit(int expert) {
    while (resident_[expert] < grid_.slices) {
      int latest = -1;
      for (int other = 0; other < grid_.experts; ++other) {
        if (resident_[other] > 0 && (latest < 0 || next_use(other) > next_use(latest))) latest = other;
      }
      if (latest < 0 || next_use(latest) <= next_use(expert)) return;
      const int moved = std::min(resident_[latest], grid_.slices - resident_[expert]);
      resident_[latest] -= moved;
      resident_[expert] += moved;
    }
  }

  const Trace& trace_;
  const ExpertGrid grid_;
  const int layer_;
  SlicesOf resident_;
  std::vector<std::vector<size_t>> coming_;  // by expert: the tokens that use it
  std::vector<size_t> next_;                 // by expert: the first of these that is still to come
};

}  // namespace

ReplayResult replay_clairvoyant(const Trace& trace, const std::vector<int>& residents_per_layer) {
  const ExpertGrid grid = trace.header().grid();
  auto resident = striped(grid, residents_per_layer);
  ReplayResult result;
  for (int layer = 0; layer < grid.layers; ++layer) {
    ClairvoyantLayer clairvoyant(trace, layer, std::move(resident[layer]));
    for (size_t token = 0; token < trace.tokens(); ++token) {
      clairvoyant.step(token, token < trace.tokens() / 2 ? result.all : result.second_half);
    }
  }
  // So far `all` is the first half.
  result.all.used += result.second_half.used;
  result.all.resident += result.second_half.resident;
  result.all.missed += result.second_half.missed;
  return result;
}

ReplayCounts replay_static_hot(const Trace& trace, const std::vector<int>& residents_per_layer) {
  const ExpertGrid grid = trace.header().grid();
  const size_t half = trace.tokens() / 2;
  ReplayCounts counts;
  for (int layer = 0; layer < grid.layers; ++layer) {
    std::vector<uint64_t> uses(grid.experts);
    for (size_t token = 0; token < half; ++token) {
      for (const int expert : trace.experts(token, layer)) ++uses[expert];
    }
    std::vector<int> order(grid.experts);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return uses[a] > uses[b]; });
    SlicesOf resident(grid.experts);
    int left = residents_per_layer[layer];
    for (const int expert : order) {
      resident[expert] = std::min(left, grid.slices);
      left -= resident[expert];
    }
    for (size_t token = half; token < trace.tokens(); ++token) {
      for (const int expert : trace.experts(token, layer)) count(counts, grid, resident[expert]);
    }
  }
  return counts;
}

}  // namespace lighter::offload
