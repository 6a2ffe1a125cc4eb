// Two results files → what changed beyond noise. Pure; thread-safe.
//
// Points are the same when model, settings and workload are. A difference counts when the medians differ by
// more than the larger spread of the two points' repeats plus the larger drift of the two baselines, and by
// more than 1 %.
#pragma once

#include <string>

#include "bench/result.h"

namespace lighter::bench {

// {"noise_floor": 0.01, "changes": [{label, metric, unit, better, before, after, change, noise}],
// "unchanged": n,
//  "only_in_a": [label], "only_in_b": [label], "broken": [label], "repaired": [label], "notes": [text]}
// change: after / before - 1. better: whether that is an improvement.
Json compare_results(const Json& before, const Json& after);

std::string comparison_markdown(const Json& comparison);

}  // namespace lighter::bench
