// What a residency policy would have done on recorded routing, token by token, one token a step, without the
// model: it drives the same ExpertCache as SlicePager does. Pure functions.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "offload/eviction_policy.h"
#include "offload/trace.h"

namespace lighter::offload {

// In slices; as ExpertCounters.
struct ReplayCounts {
  uint64_t used = 0;  // = resident + prefetched + missed
  uint64_t resident = 0;
  uint64_t prefetched = 0;  // came ahead of their layer
  uint64_t missed = 0;
  uint64_t wasted = 0;    // were prefetched and not needed
  uint64_t promoted = 0;  // were copied behind the steps, to become resident

  double hit_rate() const { return share(resident); }
  // If whatever was guessed arrives in time.
  double hit_rate_in_time() const { return share(resident + prefetched); }
  uint64_t moved() const { return prefetched + missed + wasted + promoted; }
  ReplayCounts operator-(const ReplayCounts& before) const;
  bool operator==(const ReplayCounts&) const = default;

 private:
  double share(uint64_t slices) const {
    return used == 0 ? 1.0 : static_cast<double>(slices) / static_cast<double>(used);
  }
};

struct ReplayResult {
  ReplayCounts all;
  ReplayCounts second_half;  // of the tokens
};

// Slots of a layer, the same for each, as the planner rounds a share of its slices.
std::vector<int> residents_for(const ExpertGrid& grid, double share);

// prefetch_depth: what the predictor expected so many decoder layers ahead is prefetched, and no other guess;
// 0: nothing is. There are as many spare slots as the planner gives that depth at most.
ReplayResult replay(const Trace& trace, const std::vector<int>& residents_per_layer, PolicyKind policy,
                    int prefetch_depth);

// As a decode graph runs the policy: missed slices are read where they lie, and hot ones come behind the
// steps, each copy in the eight steps between two passes (promoter.h). With as many spare slots as the
// planner gives without prefetch.
ReplayResult replay_behind(const Trace& trace, const std::vector<int>& residents_per_layer,
                           PolicyKind policy);

// The ceiling: starts like the others, but knows all that comes, and keeps those slices of a layer that are
// needed soonest; what is needed later than all residents is not admitted (Belady's MIN with bypass).
ReplayResult replay_clairvoyant(const Trace& trace, const std::vector<int>& residents_per_layer);

// The experts that each layer's first half of the tokens uses most are resident, whole, and stay.
// Counts the second half only.
ReplayCounts replay_static_hot(const Trace& trace, const std::vector<int>& residents_per_layer);

// The k likeliest by fp16 logits; ties go to the lower number.
std::vector<int> top_experts(std::span<const uint16_t> logits, int k);

struct GuessQuality {
  std::vector<std::optional<double>> layers;  // by MoE layer; nothing where nobody guesses
  double all = 0;                             // over the layers where somebody does
};

// The share of a token's experts that the guess made `depth` layers earlier names.
GuessQuality guess_overlap(const Trace& trace, int depth);
// The same for the guess that a token takes the experts of the token before it in its sequence.
GuessQuality repeat_overlap(const Trace& trace);

}  // namespace lighter::offload
