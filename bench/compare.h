// Two results files → what changed beyond noise. Pure; thread-safe.
//
// Points are the same when model, settings and workload are. A difference in time counts when the medians
// differ by more than the larger spread of the two points' repeats plus the larger drift of the two
// baselines, and by more than 1 %; in memory, which does not vary, by more than 1 %.
#pragma once

#include <string>

#include "bench/result.h"

namespace lighter::bench {

// {"noise_floor": 0.01, "changes": [{label, metric, title, better, before, after, change, noise}],
//  "compared": n, "unchanged": n, "only_in_a": [label], "only_in_b": [label], "broken": [label],
//  "repaired": [label], "notes": [text]}
// change: after / before - 1. better: whether that is an improvement. compared: points that both have. notes:
// what else differs (machines, routing, prompts, …), which may explain the changes.
Json compare_results(const Json& before, const Json& after);

std::string comparison_markdown(const Json& comparison);

}  // namespace lighter::bench
