#include "offload/planner.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>

#include "runtime/bytes.h"
#include "runtime/error.h"

namespace lighter::offload {
namespace {

constexpr int kFewestSpareSlots = 2;  // one is computed from while the other is filled

std::string percent(double share) {
  char text[16];
  std::snprintf(text, sizeof text, "%.1f %%", 100 * share);
  return text;
}

// Room for the misses of the layer at hand and for what is prefetched for the coming ones.
int wanted_spare_slots(const PlanRequest& request) {
  const int64_t layers_at_once = 2 + request.prefetch_depth;
  const int64_t wanted = std::max<int64_t>(layers_at_once * request.experts_per_token * request.grid.slices,
                                           request.streaming_slots);
  return static_cast<int>(
      std::clamp<int64_t>(wanted, kFewestSpareSlots, 2 * request.grid.slices_per_layer()));
}

// An equal share for every layer; what is left over goes to the first ones.
std::vector<int> spread(const ExpertGrid& grid, uint64_t slots) {
  slots = std::min<uint64_t>(slots, grid.total_slices());
  std::vector<int> layers(grid.layers, static_cast<int>(slots / grid.layers));
  for (uint64_t i = 0; i < slots % grid.layers; ++i) ++layers[i];
  return layers;
}

std::vector<int> by_ratio(const ExpertGrid& grid, const std::vector<double>& ratios) {
  std::vector<int> layers;
  for (const double ratio : ratios) {
    layers.push_back(static_cast<int>(std::lround(ratio * static_cast<double>(grid.slices_per_layer()))));
  }
  return layers;
}

uint64_t sum(const std::vector<int>& values) {
  return std::accumulate(values.begin(), values.end(), uint64_t{0});
}

class Planner {
 public:
  explicit Planner(const PlanRequest& request) : request_(request), grid_(request.grid) {
    plan_.lines = request.fixed;
    plan_.device_budget_bytes = request.device_budget_bytes;
    plan_.host_budget_bytes = request.host_budget_bytes;
    plan_.pager.policy = request.policy;
    plan_.pager.pinned = request.pinned;
    plan_.pager.prefetch = request.prefetch_depth > 0;
    plan_.pager.load_threads = request.load_threads;
    for (const PlanLine& line : request.fixed) fixed_device_ += line.device_bytes;
  }

  Plan make() {
    if (grid_.layers == 0) {
      plan_.all_resident = true;
      plan_.resident_share = 1;
      plan_.lines.push_back({"staging for loading", 0, request_.load_staging_bytes});
    } else {
      place_experts();
    }
    std::erase_if(plan_.lines, [](const PlanLine& line) { return line.device_bytes + line.host_bytes == 0; });
    for (const PlanLine& line : plan_.lines) {
      plan_.device_bytes += line.device_bytes;
      plan_.host_bytes += line.host_bytes;
    }
    check_device();
    check_host();
    return std::move(plan_);
  }

 private:
  uint64_t device_left() const {
    return request_.device_budget_bytes > fixed_device_ ? request_.device_budget_bytes - fixed_device_ : 0;
  }
  uint64_t slots_left() const { return device_left() / grid_.slice_bytes; }

  void place_experts() {
    std::vector<int>& residents = plan_.pager.residents_per_layer;
    if (request_.resident) {
      residents = by_ratio(grid_, *request_.resident);
    } else if (slots_left() >= grid_.total_slices()) {
      residents = spread(grid_, grid_.total_slices());
    } else {
      const uint64_t spare = std::min<uint64_t>(wanted_spare_slots(request_), slots_left() / 4);
      residents =
          spread(grid_, slots_left() - std::min(slots_left(), std::max<uint64_t>(spare, kFewestSpareSlots)));
    }
    const uint64_t resident = sum(residents);
    plan_.resident_share = static_cast<double>(resident) / static_cast<double>(grid_.total_slices());
    plan_.all_resident = resident == grid_.total_slices();
    plan_.lines.push_back({"experts, resident", resident * grid_.slice_bytes, 0});
    if (plan_.all_resident) {
      plan_.lines.push_back(
          {"staging for loading", 0, std::max(grid_.expert_bytes(), request_.load_staging_bytes)});
      return;
    }
    const uint64_t room = slots_left() > resident ? slots_left() - resident : 0;
    plan_.pager.spare_slots = static_cast<int>(
        std::clamp<uint64_t>(room, kFewestSpareSlots, static_cast<uint64_t>(wanted_spare_slots(request_))));
    plan_.lines.push_back({"experts, in transit", plan_.pager.spare_slots * grid_.slice_bytes, 0});
    place_homes();
  }

  void place_homes() {
    try {
      const InitialResidency initial = initial_residency(grid_, plan_.pager);
      const auto homes = std::count(initial.has_home.begin(), initial.has_home.end(), true);
      plan_.lines.push_back({kExpertStoreLine, 0, static_cast<uint64_t>(homes) * grid_.slice_bytes});
      plan_.lines.push_back({"staging for loading", 0,
                             std::max(load_staging_bytes(grid_, plan_.pager), request_.load_staging_bytes)});
    } catch (const CapacityError& error) {
      plan_.problems.push_back(error.what());
    }
  }

  void check_device() {
    if (plan_.device_bytes <= plan_.device_budget_bytes) return;
    std::string text = "the device needs " + format_bytes(plan_.device_bytes) + ", " +
                       format_bytes(plan_.device_bytes - plan_.device_budget_bytes) +
                       " more than memory.gpu_budget (" + format_bytes(plan_.device_budget_bytes) + ")";
    const uint64_t least = fixed_device_ + (grid_.layers > 0 ? kFewestSpareSlots * grid_.slice_bytes : 0);
    if (least > plan_.device_budget_bytes) {
      text += "; even with no expert resident it needs " + format_bytes(least) +
              ": raise the budget, or lower memory.context or memory.prefill_chunk";
    } else {
      // Whole slices of every layer: a share is rounded in each, so a share of the total could still be too
      // much.
      const uint64_t slots_of_a_layer =
          (slots_left() - kFewestSpareSlots) / static_cast<uint64_t>(grid_.layers);
      const double share =
          static_cast<double>(slots_of_a_layer) / static_cast<double>(grid_.slices_per_layer());
      text += "; offload.resident up to " + percent(std::floor(share * 1000) / 1000) +
              " fits, or leave it at auto";
    }
    plan_.problems.push_back(text);
  }

  void check_host() {
    if (plan_.host_bytes <= plan_.host_budget_bytes) return;
    std::string text = "the host needs " + format_bytes(plan_.host_bytes) + ", " +
                       format_bytes(plan_.host_bytes - plan_.host_budget_bytes) +
                       " more than memory.host_budget (" + format_bytes(plan_.host_budget_bytes) + ")";
    PlanRequest with_static = request_;
    with_static.policy = PolicyKind::static_;
    const uint64_t static_bytes =
        request_.policy == PolicyKind::static_ ? plan_.host_bytes : make_plan(with_static).host_bytes;
    if (static_bytes <= plan_.host_budget_bytes) {
      text += "; offload.policy: static fits: it needs " + format_bytes(static_bytes) +
              ", because what never leaves the device keeps no copy on the host";
    } else {
      text +=
          ": raise the budget, or raise memory.gpu_budget and set offload.policy: static, which keeps on the "
          "host only what is not resident";
    }
    plan_.problems.push_back(text);
  }

  const PlanRequest& request_;
  const ExpertGrid grid_;
  uint64_t fixed_device_ = 0;
  Plan plan_;
};

}  // namespace

Plan make_plan(const PlanRequest& request) {
  return Planner(request).make();
}

}  // namespace lighter::offload
