// Counts every byte before anything is allocated: what is needed where, what becomes resident, whether it fits,
// and if not, what would. A pure function.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "offload/slice_pager.h"
#include "runtime/moe/expert_id.h"

namespace lighter::offload {

// The line of the experts' home in host memory.
inline constexpr const char* kExpertStoreLine = "expert store";

struct PlanLine {
  std::string what;
  uint64_t device_bytes = 0;
  uint64_t host_bytes = 0;
};

struct PlanRequest {
  uint64_t device_budget_bytes = 0;
  uint64_t host_budget_bytes = 0;
  std::vector<PlanLine> fixed;      // everything but the experts
  uint64_t load_staging_bytes = 0;  // host, while the other weights load; given back before the experts come
  ExpertGrid grid;                  // of no layers for a dense model
  int experts_per_token = 0;
  // The share of each MoE layer's slices that starts resident; none: as many as fit.
  std::optional<std::vector<double>> resident;
  PolicyKind policy = PolicyKind::lru;
  std::vector<ExpertId> pinned;
  int prefetch_depth = 0;
  // Slots that steps which take nearly every expert need, so that copies go on while a layer computes something else.
  int streaming_slots = 0;
  int load_threads = 1;
};

struct Plan {
  std::vector<PlanLine> lines;
  uint64_t device_budget_bytes = 0;
  uint64_t host_budget_bytes = 0;
  uint64_t device_bytes = 0;  // sum of the lines
  uint64_t host_bytes = 0;
  PagerOptions pager;
  bool all_resident = false;  // nothing to page
  double resident_share = 0;
  std::vector<std::string> problems;  // what does not fit, and what would; empty: it fits

  bool fits() const { return problems.empty(); }
};

Plan make_plan(const PlanRequest& request);

}  // namespace lighter::offload
