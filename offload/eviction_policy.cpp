#include "offload/eviction_policy.h"

#include <cmath>
#include <vector>

namespace lighter::offload {
namespace {

constexpr double kHalfLifeSteps = 256;

class StaticPolicy : public EvictionPolicy {
 public:
  void touch(ExpertId, uint64_t) override {}
  std::optional<size_t> victim(ExpertId, std::span<const SliceId>) const override { return std::nullopt; }
};

// The candidate with the smallest score; ties go to the last in slice order, so that an expert shrinks from
// its end.
template <typename Score>
std::optional<size_t> lowest(std::span<const SliceId> candidates, Score score) {
  std::optional<size_t> best;
  double best_score = 0;
  for (size_t i = 0; i < candidates.size(); ++i) {
    const double at_i = score(candidates[i].owner());
    const bool better = !best || at_i < best_score ||
                        (at_i == best_score && candidates[i].slice > candidates[*best].slice);
    if (better) {
      best = i;
      best_score = at_i;
    }
  }
  return best;
}

class LruPolicy : public EvictionPolicy {
 public:
  explicit LruPolicy(const ExpertGrid& grid)
      : experts_(grid.experts), last_use_(static_cast<size_t>(grid.layers) * grid.experts, -1.0) {}

  void touch(ExpertId expert, uint64_t step) override { last_use_[index(expert)] = static_cast<double>(step); }
  std::optional<size_t> victim(ExpertId, std::span<const SliceId> candidates) const override {
    return lowest(candidates, [&](ExpertId expert) { return last_use_[index(expert)]; });
  }

 private:
  size_t index(ExpertId expert) const { return static_cast<size_t>(expert.layer) * experts_ + expert.expert; }

  int experts_;
  std::vector<double> last_use_;
};

class LfuPolicy : public EvictionPolicy {
 public:
  explicit LfuPolicy(const ExpertGrid& grid)
      : experts_(grid.experts), uses_(static_cast<size_t>(grid.layers) * grid.experts) {}

  void touch(ExpertId expert, uint64_t step) override {
    Uses& uses = uses_[index(expert)];
    uses = {aged(uses, step) + 1, step};
    now_ = step;
  }
  std::optional<size_t> victim(ExpertId incoming, std::span<const SliceId> candidates) const override {
    const auto score = [&](ExpertId expert) { return aged(uses_[index(expert)], now_); };
    const auto chosen = lowest(candidates, score);
    if (chosen && score(incoming) < score(candidates[*chosen].owner())) return std::nullopt;
    return chosen;
  }

 private:
  struct Uses {
    double count = 0;
    uint64_t step = 0;
  };
  static double aged(const Uses& uses, uint64_t step) {
    return uses.count * std::exp2(-static_cast<double>(step - uses.step) / kHalfLifeSteps);
  }
  size_t index(ExpertId expert) const { return static_cast<size_t>(expert.layer) * experts_ + expert.expert; }

  int experts_;
  std::vector<Uses> uses_;
  uint64_t now_ = 0;
};

}  // namespace

std::unique_ptr<EvictionPolicy> make_policy(PolicyKind kind, const ExpertGrid& grid) {
  switch (kind) {
    case PolicyKind::static_:
      return std::make_unique<StaticPolicy>();
    case PolicyKind::lru:
      return std::make_unique<LruPolicy>(grid);
    case PolicyKind::lfu:
      return std::make_unique<LfuPolicy>(grid);
  }
  return nullptr;
}

}  // namespace lighter::offload
