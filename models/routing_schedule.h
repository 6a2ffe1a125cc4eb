// Who chooses the experts instead of the router. Random weights route with arbitrary skew, so timed runs on
// synthetic weights take a seeded schedule; tests force a recorded one. A choice depends on the MoE layer and
// the token's position alone, so it is the same however the tokens are put into steps.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace lighter::models {

// The k distinct experts of the token at this position, in the order of their rank. A step asks for a token
// of the sequence in slot s as at position + s · kSequenceStride, so that the sequences of a batch differ.
inline constexpr int64_t kSequenceStride = int64_t{1} << 40;
using RoutingSchedule = std::function<void(int moe_layer, int64_t position, int64_t* experts)>;

// What is chosen, and what the layer before expects it to be: -1 where it expects nothing; or empty.
struct ScheduledRouting {
  RoutingSchedule chosen;
  RoutingSchedule expected;
};

RoutingSchedule uniform_schedule(int experts, int k, uint64_t seed);
// Probability of the expert at rank r proportional to 1 / (r + 1)^s, with a seeded order of ranks per layer.
RoutingSchedule zipf_schedule(int experts, int k, int layers, double s, uint64_t seed);
// routing: [moe_layers, positions, k], row by row.
RoutingSchedule recorded_schedule(std::vector<int32_t> routing, int64_t positions, int k);

}  // namespace lighter::models
