#include "offload/planner.h"

#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <random>

#include "tests/offload/pager_rig.h"

namespace lighter::offload {
namespace {

constexpr uint64_t kSlice = 4096;
constexpr ExpertGrid kGrid{4, 8, 3, kSlice};  // 96 slices
constexpr uint64_t kFixed = 10'000;

PlanRequest request_of(uint64_t device_slots, uint64_t host_slices = 1000) {
  PlanRequest request;
  request.device_budget_bytes = kFixed + device_slots * kSlice;
  request.host_budget_bytes = 500 + host_slices * kSlice;
  request.fixed = {{"attention", 6000, 0}, {"KV cache", 4000, 0}, {"embedding", 0, 500}};
  request.grid = kGrid;
  request.experts_per_token = 1;
  request.prefetch_depth = 1;
  return request;
}

uint64_t line(const Plan& plan, const std::string& what, bool device) {
  for (const PlanLine& line : plan.lines) {
    if (line.what == what) return device ? line.device_bytes : line.host_bytes;
  }
  return 0;
}

bool mentions(const Plan& plan, const std::string& text) {
  for (const std::string& problem : plan.problems) {
    if (problem.find(text) != std::string::npos) return true;
  }
  return false;
}

// The share in "... offload.resident up to 43.7 % fits ...", or -1.
double advised_share(const Plan& plan) {
  constexpr std::string_view kBefore = "offload.resident up to ";
  for (const std::string& problem : plan.problems) {
    const size_t at = problem.find(kBefore);
    if (at != std::string::npos) return std::strtod(problem.c_str() + at + kBefore.size(), nullptr) / 100;
  }
  return -1;
}

void check_sums(const Plan& plan) {
  uint64_t device = 0;
  uint64_t host = 0;
  for (const PlanLine& each : plan.lines) {
    device += each.device_bytes;
    host += each.host_bytes;
  }
  CHECK(plan.device_bytes == device);
  CHECK(plan.host_bytes == host);
}

}  // namespace

TEST_CASE("a dense model needs what its parts need") {
  PlanRequest request = request_of(0);
  request.grid = {};
  const Plan plan = make_plan(request);
  CHECK(plan.fits());
  CHECK(plan.all_resident);
  CHECK(plan.device_bytes == kFixed);
  CHECK(plan.host_bytes == 500);
  request.device_budget_bytes = kFixed - 1;
  const Plan refused = make_plan(request);
  CHECK_FALSE(refused.fits());
  CHECK(mentions(refused, "the device needs 9.77 KiB, 1 B more than memory.gpu_budget"));
  CHECK(mentions(refused, "lower memory.context"));
}

TEST_CASE("auto keeps every expert resident where all fit, and then nothing is paged") {
  const Plan plan = make_plan(request_of(96));
  CHECK(plan.fits());
  CHECK(plan.all_resident);
  CHECK(plan.resident_share == 1);
  CHECK(plan.device_bytes == kFixed + 96 * kSlice);
  CHECK(line(plan, "experts, in transit", true) == 0);
  CHECK(line(plan, "expert store", false) == 0);
  CHECK(plan.host_bytes == 500 + 3 * kSlice);  // one expert's staging
  check_sums(plan);
}

TEST_CASE("auto fills the device with residents and leaves room for what is in transit") {
  const Plan plan = make_plan(request_of(60));
  CHECK(plan.fits());
  CHECK_FALSE(plan.all_resident);
  // Three layers at once of one expert of three slices.
  CHECK(plan.pager.spare_slots == 9);
  CHECK(plan.pager.residents_per_layer == std::vector<int>{13, 13, 13, 12});
  CHECK(plan.resident_share == doctest::Approx(51.0 / 96));
  CHECK(plan.device_bytes == plan.device_budget_bytes);
  CHECK(line(plan, "experts, resident", true) == 51 * kSlice);
  CHECK(line(plan, "experts, in transit", true) == 9 * kSlice);
  check_sums(plan);
}

TEST_CASE("auto fits whatever the budget, down to two slots in transit") {
  for (int slots = 2; slots <= 100; ++slots) {
    CAPTURE(slots);
    const Plan plan = make_plan(request_of(slots));
    CHECK(plan.fits());
    CHECK(plan.device_bytes <= plan.device_budget_bytes);
    // Nothing that could hold a slice is left over, unless all are resident.
    if (!plan.all_resident) CHECK(plan.device_budget_bytes - plan.device_bytes < kSlice);
    CHECK((plan.all_resident || plan.pager.spare_slots >= 2));
    check_sums(plan);
  }
  const Plan refused = make_plan(request_of(1));
  CHECK_FALSE(refused.fits());
  CHECK(mentions(refused, "even with no expert resident it needs 17.77 KiB"));
}

TEST_CASE("the fixed parts alone may be too much") {
  PlanRequest request = request_of(0);
  request.device_budget_bytes = 9'000;
  const Plan plan = make_plan(request);
  CHECK_FALSE(plan.fits());
  CHECK(mentions(plan, "even with no expert resident"));
  check_sums(plan);
}

TEST_CASE("ratios are taken per layer, to the nearest slice") {
  PlanRequest request = request_of(96);
  request.resident = std::vector<double>{0, 0.5, 0.51, 1};
  const Plan plan = make_plan(request);
  CHECK(plan.fits());
  CHECK(plan.pager.residents_per_layer == std::vector<int>{0, 12, 12, 24});
  CHECK(plan.resident_share == 0.5);
  request.resident = std::vector<double>(4, 1.0);
  CHECK(make_plan(request).all_resident);
}

TEST_CASE("a ratio that does not fit is refused with the largest that does") {
  for (int slots = 2; slots < 96; ++slots) {
    for (const ExpertGrid grid :
         {kGrid, ExpertGrid{4, 16, 16, kSlice / 16}, ExpertGrid{48, 2, 1, kSlice / 4}}) {
      PlanRequest request = request_of(slots);
      request.grid = grid;
      request.resident = std::vector<double>(grid.layers, 1.0);
      const Plan plan = make_plan(request);
      if (plan.fits()) continue;
      CAPTURE(slots);
      CAPTURE(grid.layers);
      const double advised = advised_share(plan);
      REQUIRE(advised >= 0);
      request.resident = std::vector<double>(grid.layers, advised);
      CHECK(make_plan(request).fits());
      // Another slice in every layer would not.
      request.resident = std::vector<double>(
          grid.layers, advised + 0.001 + 1.0 / static_cast<double>(grid.slices_per_layer()));
      CHECK_FALSE(make_plan(request).fits());
    }
  }
}

TEST_CASE("lru needs a home on the host for every slice, static only for those that are not resident") {
  PlanRequest request = request_of(60);
  const Plan lru = make_plan(request);
  CHECK(line(lru, "expert store", false) == 96 * kSlice);
  CHECK(line(lru, "staging for loading", false) == 0);
  request.policy = PolicyKind::static_;
  const Plan fixed = make_plan(request);
  CHECK(line(fixed, "expert store", false) == (96 - 51) * kSlice);
  CHECK(line(fixed, "staging for loading", false) == 2 * kSlice);
  CHECK(fixed.device_bytes == lru.device_bytes);
}

TEST_CASE("too little host memory is refused, naming static where that fits") {
  PlanRequest request = request_of(60, 60);
  const Plan plan = make_plan(request);
  CHECK_FALSE(plan.fits());
  CHECK(mentions(plan, "more than memory.host_budget"));
  CHECK(mentions(plan, "offload.policy: static fits: it needs 188.49 KiB"));
  request.policy = PolicyKind::static_;
  CHECK(make_plan(request).fits());
  request.host_budget_bytes = 500 + 10 * kSlice;
  const Plan refused = make_plan(request);
  CHECK_FALSE(refused.fits());
  CHECK_FALSE(mentions(refused, "static fits"));
  CHECK(mentions(refused, "raise the budget"));
  request.policy = PolicyKind::lfu;
  CHECK_FALSE(mentions(make_plan(request), "static fits"));
}

TEST_CASE("staging for the other weights and for the experts never exist together: the larger one counts") {
  PlanRequest request = request_of(60);
  request.policy = PolicyKind::static_;
  request.load_staging_bytes = 1 << 20;
  CHECK(line(make_plan(request), "staging for loading", false) == 1 << 20);
  request.load_staging_bytes = 1;
  CHECK(line(make_plan(request), "staging for loading", false) == 2 * kSlice);
}

TEST_CASE("pinned experts count among the residents, and too many of them are refused") {
  PlanRequest request = request_of(60);
  request.pinned = {{0, 1}, {0, 2}};
  const Plan plan = make_plan(request);
  CHECK(plan.fits());
  CHECK(plan.device_bytes == make_plan(request_of(60)).device_bytes);
  CHECK(line(plan, "expert store", false) == (96 - 6) * kSlice);
  request.pinned = {{0, 0}, {0, 1}, {0, 2}, {0, 3}, {0, 4}};
  const Plan refused = make_plan(request);
  CHECK_FALSE(refused.fits());
  CHECK(mentions(refused, "offload.pin asks for 15 slices of MoE layer 0, but 13 can be resident"));
}

TEST_CASE("prefetch is on exactly when layers are looked ahead") {
  PlanRequest request = request_of(60);
  CHECK(make_plan(request).pager.prefetch);
  request.prefetch_depth = 0;
  CHECK_FALSE(make_plan(request).pager.prefetch);
}

TEST_CASE("what was planned is what a pager takes: it loads and runs in budgets of just that many bytes") {
  std::mt19937 random(3);
  int paged = 0;
  for (int round = 0; round < 60; ++round) {
    PlanRequest request = request_of(random() % 100);
    request.fixed.clear();
    request.load_threads = 1 + static_cast<int>(random() % 3);
    request.prefetch_depth = static_cast<int>(random() % 3);
    request.policy = std::array{PolicyKind::static_, PolicyKind::lru, PolicyKind::lfu}[random() % 3];
    if (random() % 2 == 0) request.pinned = {{1, 3}};
    if (random() % 2 == 0) {
      request.resident.emplace();
      for (int layer = 0; layer < kGrid.layers; ++layer) {
        request.resident->push_back(static_cast<double>(random() % 100) / 100);
      }
    }
    const Plan plan = make_plan(request);
    if (!plan.fits() || plan.all_resident) continue;
    ++paged;
    const auto device = make_cpu_device(plan.device_bytes, plan.host_bytes);
    SlicePager pager(*device, kGrid, plan.pager);
    CHECK(device->device_budget().used_bytes() == plan.device_bytes);
    pager.load(PatternSource(kGrid), kNoProgress);
    CHECK(pager.store().bytes() == line(plan, "expert store", false));
    for (int step = 0; step < 3; ++step) {
      for (int layer = 0; layer < kGrid.layers; ++layer) {
        pager.visit(layer, std::vector<int>{0, 5}, false, {{}, [] {}, [](int, int, std::span<const std::byte* const>) {}});
      }
      pager.between_steps();
    }
    CHECK(device->device_budget().peak_bytes() == plan.device_bytes);
    CHECK(device->host_budget().peak_bytes() <= plan.host_bytes);
  }
  CHECK(paged > 20);
}

}  // namespace lighter::offload
