// Measurements → the JSON that results.json holds (bench/results.schema.json says what it looks like), and
// what can be said only when several points are there: the baseline's drift and each point's penalty. Pure;
// thread-safe.
#pragma once

#include <nlohmann/json.hpp>
#include <span>
#include <string>

#include "bench/measure.h"
#include "bench/sweep.h"

namespace lighter::bench {

using Json = nlohmann::ordered_json;

constexpr int kResultsVersion = 1;

Json new_results(const Sweep& sweep, const MachineFacts& machine, const Rates& rates);

struct Measured {
  double load_s = 0;
  bool load_kept = false;
  bool store_kept = false;
  std::optional<uint64_t> in_use_before_bytes;
  PointFacts facts;
  std::vector<RequestSample> samples;  // at least one
  MemoryPeaks memory;
};
// cores: that the process may use, for the CPU's busy share.
Json measured_point(const Point& point, const Measured& measured, const Rates& rates, int cores);
Json timeline_json(const Timeline& timeline);
// kind: "CapacityError", …
Json failed_point(const Point& point, const std::string& kind, const std::string& message);

// Sets drift, leak, and each point's penalties from the points that are there. The baseline's figure is the
// median of its rounds with the same workload.
void complete_results(Json& results);

}  // namespace lighter::bench
