// Lets hot slices become resident behind steps that read slices where they lie, as a decode graph's do:
// copies into spare slots, which the policy admits once they are there. Book-keeping only; who uses it moves
// the bytes.
//
// Every step touches its experts. Every kLearningSteps steps, layer by layer, what has come is admitted, and
// copies of absent slices of that step's experts begin, kMostPromotions at the most and as many as there are
// spare slots; the layers take turns at being first. Not thread-safe.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "offload/expert_cache.h"

namespace lighter::offload {

enum class CopyState : uint8_t { under_way, there, lost };

class Promoter {
 public:
  static constexpr int kLearningSteps = 8, kMostPromotions = 32;

  struct Copies {
    std::function<void(SliceId slice, int slot)> begin;
    std::function<CopyState(SliceId slice)> state;   // of one that has begun
    std::function<void(SliceId slice)> ended;        // it is admitted, or of no use any more
    std::function<void(int slot)> prefetch_dropped;  // by an earlier step, of another kind
  };

  explicit Promoter(ExpertCache& cache) : cache_(cache) {}

  // After a step that chose these experts, [layers, k]. Publishes nothing: end_step() is the caller's.
  // Returns how many slices were copied in vain.
  int learn(std::span<const int> experts, const Copies& copies);
  // A step that visits layers needs the spare slots itself: frees them. Returns whose copies are to be
  // stopped.
  std::vector<SliceId> drop();
  size_t under_way() const { return under_way_.size(); }

 private:
  int visit(int layer, std::span<const int> experts, int& left, const Copies& copies);

  ExpertCache& cache_;
  std::vector<SliceId> under_way_;
  int steps_ = 0;
  int first_layer_ = 0;
};

}  // namespace lighter::offload
