#include "offload/slice_pager.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <thread>

#include "runtime/error.h"
#include "tests/offload/pager_rig.h"

namespace lighter::offload {
namespace {

constexpr ExpertGrid kGrid{4, 8, 3, 128};

PagerOptions options_of(double resident, PolicyKind policy = PolicyKind::lru, bool prefetch = false,
                        int spare_slots = 4) {
  PagerOptions options;
  options.residents_per_layer.assign(
      kGrid.layers, static_cast<int>(std::lround(resident * static_cast<double>(kGrid.slices_per_layer()))));
  options.spare_slots = spare_slots;
  options.policy = policy;
  options.prefetch = prefetch;
  return options;
}

StepVisits same_for_all_layers(std::vector<int> experts, bool streaming = false) {
  return StepVisits(kGrid.layers, LayerVisit{std::move(experts), streaming, {}, 0});
}

}  // namespace

TEST_CASE(
    "every visited slice has its bytes, for every policy, residency, prefetch, streaming and slot count") {
  std::mt19937 random(1);
  int runs = 0;
  for (const PolicyKind policy : {PolicyKind::static_, PolicyKind::lru, PolicyKind::lfu}) {
    for (const double resident : {0.0, 0.3, 0.5, 0.9, 1.0}) {
      for (const bool prefetch : {false, true}) {
        for (const double streaming : {0.0, 0.5, 1.0}) {
          for (const int spare_slots : {1, 2, 5, 24, 100}) {
            const bool lagging = runs++ % 4 == 0;
            PagerRig rig(kGrid, options_of(resident, policy, prefetch, spare_slots), lagging);
            for (int step = 0; step < 8; ++step) rig.run(draw_step(kGrid, {streaming, 0.8}, random));
            CAPTURE(static_cast<int>(policy));
            CAPTURE(resident);
            CAPTURE(prefetch);
            CAPTURE(streaming);
            CAPTURE(spare_slots);
            CAPTURE(lagging);
            REQUIRE(rig.failure() == "");
          }
        }
      }
    }
  }
}

TEST_CASE("without prefetch and streaming, exactly the slices that are not resident are copied") {
  PagerRig rig(kGrid, options_of(0.5));  // slice 0 of every expert, and slice 1 of experts 0 to 3
  rig.run(same_for_all_layers({0, 7}));
  CHECK(rig.failure() == "");
  const ExpertCounters counters = rig.pager().counters();
  CHECK(counters.slices_used == 4 * 6);
  CHECK(counters.slices_resident == 4 * 3);
  CHECK(counters.slices_prefetched == 0);
  CHECK(counters.slices_missed == 4 * 3);
  CHECK(counters.demand_bytes == 4 * 3 * 128);
  CHECK(counters.demand_busy_bytes == counters.demand_bytes);
  CHECK(counters.demand_busy_s > 0);
  CHECK(counters.prefetch_bytes == 0);
  CHECK(counters.prefetch_wasted_bytes == 0);
  CHECK(counters.evictions == 4 * 3);
  CHECK(counters.hit_rate() == 0.5);
  // What was fetched stays: the second time nothing is missed.
  rig.run(same_for_all_layers({0, 7}));
  CHECK(rig.pager().counters().slices_missed == 4 * 3);
  CHECK(rig.pager().counters().demand_bytes == 4 * 3 * 128);
  CHECK(rig.pager().counters().hit_rate() == 0.75);
}

TEST_CASE("static residency never changes, and keeps no second copy of it on the host") {
  PagerRig rig(kGrid, options_of(0.5, PolicyKind::static_, true));
  const ResidencyVersion first = rig.pager().residency();
  std::mt19937 random(2);
  for (int step = 0; step < 50; ++step) rig.run(draw_step(kGrid, {0.2, 0.5}, random));
  CHECK(rig.failure() == "");
  CHECK(rig.pager().residency() == first);
  CHECK(rig.pager().counters().evictions == 0);
  CHECK(rig.pager().store().bytes() == kGrid.total_bytes() / 2);
}

namespace {

// As a decode graph's step does it: whatever is listed as resident is read between two calls of learn().
void expect_residents_have_their_bytes(PagerRig& rig) {
  const ResidencyVersion residency = rig.pager().residency();
  for (int layer = 0; layer < kGrid.layers; ++layer) {
    for (int expert = 0; expert < kGrid.experts; ++expert) {
      for (int i = 0; i < kGrid.slices; ++i) {
        const SliceLocation& at = residency->at({layer, expert, i});
        if (at.on_device()) REQUIRE(rig.source().matches({layer, expert, i}, at.address));
      }
    }
  }
}

void visit_all_layers(PagerRig& rig, const std::vector<int>& experts) {
  for (int layer = 0; layer < kGrid.layers; ++layer) {
    LayerWork work;
    work.overlap = [] {};
    work.use = [&](int expert, int first, std::span<const std::byte* const> addresses) {
      rig.device().compute_stream().synchronize();  // the slices are there
      for (const std::byte* address : addresses)
        REQUIRE(rig.source().matches({layer, expert, first++}, address));
    };
    rig.pager().visit(layer, experts, false, work);
    CHECK(rig.pager().promoting() == 0);
  }
  rig.device().compute_stream().synchronize();
  rig.pager().between_steps();
  REQUIRE(rig.pager().consistent());
}

int residents_of(const SlicePager& pager, int layer, int expert) {
  int count = 0;
  for (int i = 0; i < kGrid.slices; ++i) count += pager.residency()->at({layer, expert, i}).on_device();
  return count;
}

}  // namespace

TEST_CASE(
    "behind a decode graph's steps, what is chosen often becomes resident, and residents always have their "
    "bytes") {
  for (const PolicyKind policy : {PolicyKind::lru, PolicyKind::lfu}) {
    for (const int spare_slots : {1, 4, 40}) {
      CAPTURE(static_cast<int>(policy));
      CAPTURE(spare_slots);
      PagerRig rig(kGrid, options_of(0.5, policy, false, spare_slots), true);
      std::vector<int> chosen;
      for (int layer = 0; layer < kGrid.layers; ++layer) chosen.insert(chosen.end(), {6, layer});
      int steps = 0;
      const auto settled = [&] {
        for (int layer = 0; layer < kGrid.layers; ++layer) {
          if (residents_of(rig.pager(), layer, 6) + residents_of(rig.pager(), layer, layer) < 6) return false;
        }
        return true;
      };
      for (; steps < 4000 && !settled(); ++steps) {
        rig.pager().learn(chosen);
        expect_residents_have_their_bytes(rig);
        REQUIRE(rig.pager().consistent());
        if (steps % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(300));
      }
      CHECK(settled());
      const ExpertCounters counters = rig.pager().counters();
      CHECK(counters.evictions >= 4 * 3);
      CHECK(counters.prefetch_bytes >= counters.evictions * 128);
      // Then nothing is left to do.
      for (int i = 0; i < 3 * Promoter::kLearningSteps; ++i) rig.pager().learn(chosen);
      const uint64_t evictions = rig.pager().counters().evictions;
      for (int i = 0; i < 3 * Promoter::kLearningSteps; ++i) rig.pager().learn(chosen);
      CHECK(rig.pager().counters().evictions == evictions);
    }
  }
}

TEST_CASE("steps that visit layers come between those that do not, and find their spare slots free") {
  std::mt19937 random(7);
  for (const PolicyKind policy : {PolicyKind::static_, PolicyKind::lru, PolicyKind::lfu}) {
    for (const int spare_slots : {1, 5, 40}) {
      CAPTURE(static_cast<int>(policy));
      CAPTURE(spare_slots);
      PagerRig rig(kGrid, options_of(0.4, policy, true, spare_slots), true);
      const ResidencyVersion first = rig.pager().residency();
      for (int step = 0; step < 60; ++step) {
        for (int i = 0; i < 20; ++i) {
          std::vector<int> chosen;
          for (int layer = 0; layer < kGrid.layers; ++layer) chosen.push_back(static_cast<int>(random() % 8));
          rig.pager().learn(chosen);
          expect_residents_have_their_bytes(rig);
        }
        if (step % 2 == 0) {  // in the middle of copies
          visit_all_layers(rig, {static_cast<int>(random() % 4), 4 + static_cast<int>(random() % 4)});
          continue;
        }
        while (rig.pager().promoting() > 0) rig.pager().learn({});
        rig.run(draw_step(kGrid, {0.3, 0.5}, random));
        REQUIRE(rig.failure() == "");
      }
      CHECK((rig.pager().residency() == first) == (policy == PolicyKind::static_));
    }
  }
}

TEST_CASE("the residency at the start is the same share of every expert") {
  PagerRig rig(kGrid, options_of(0.5));
  for (int layer = 0; layer < kGrid.layers; ++layer) {
    for (int expert = 0; expert < kGrid.experts; ++expert) {
      for (int i = 0; i < kGrid.slices; ++i) {
        const SliceLocation& at = rig.pager().residency()->at({layer, expert, i});
        CHECK(at.on_device() == (i == 0 || (i == 1 && expert < 4)));
        if (at.on_device()) CHECK(rig.source().matches({layer, expert, i}, at.address));
      }
    }
  }
}

TEST_CASE("pinned experts are resident whole, for ever, and only there") {
  for (const PolicyKind policy : {PolicyKind::static_, PolicyKind::lru, PolicyKind::lfu}) {
    PagerOptions options = options_of(0.5, policy, true);
    options.pinned = {{0, 7}, {2, 7}, {2, 1}};
    PagerRig rig(kGrid, options);
    std::mt19937 random(3);
    for (int step = 0; step < 100; ++step) {
      rig.run(draw_step(kGrid, {0.1, 0.5, 0.5, 2, 8}, random));
      for (const ExpertId pinned : options.pinned) {
        for (int i = 0; i < kGrid.slices; ++i) {
          const SliceId slice{pinned.layer, pinned.expert, i};
          REQUIRE(rig.pager().residency()->at(slice).on_device());
          REQUIRE_FALSE(rig.pager().store().has_home(slice));
        }
      }
    }
    CHECK(rig.failure() == "");
  }
}

TEST_CASE("a hint that comes in time turns misses into slices that are there already") {
  PagerRig rig(kGrid, options_of(0, PolicyKind::static_, true, 12));
  SlicePager& pager = rig.pager();
  // However slow this machine is, some pause is long enough for the prefetches to come in time.
  for (int pause_ms = 5;; pause_ms *= 2) {
    REQUIRE(pause_ms < 10'000);
    const ExpertCounters before = pager.counters();
    StepVisits step = same_for_all_layers({0});
    step[1].experts = {2, 3};
    step[0].hints = {{1, {2, 3}}};
    step[0].pause_us = pause_ms * 1000;
    rig.run(step);
    REQUIRE(rig.failure() == "");
    const ExpertCounters did = pager.counters() - before;
    CHECK(did.slices_prefetched + did.slices_missed == 15);
    CHECK(did.prefetch_bytes + did.demand_bytes == 15 * 128);
    CHECK(did.prefetch_wasted_bytes == 0);
    CHECK(did.hit_rate() == 0);
    if (did.prefetch_bytes < 6 * 128) continue;
    CHECK(did.slices_prefetched == 6);
    CHECK(did.slices_missed == 9);
    CHECK(did.prefetch_bytes == 6 * 128);
    break;
  }
}

TEST_CASE("a wrong guess is counted as wasted, and a late one does nothing") {
  PagerRig rig(kGrid, options_of(0, PolicyKind::lru, true, 12));
  SlicePager& pager = rig.pager();
  for (int pause_ms = 5;; pause_ms *= 2) {
    REQUIRE(pause_ms < 10'000);
    const ExpertCounters before = pager.counters();
    StepVisits step = same_for_all_layers({0});
    step[0].hints = {{1, {2, 3}}};
    step[0].pause_us = pause_ms * 1000;
    step[3].hints = {{0, {7}}, {2, {7}}};  // those layers are over
    step[3].pause_us = pause_ms * 1000;
    rig.run(step);
    REQUIRE(rig.failure() == "");
    const ExpertCounters did = pager.counters() - before;
    CHECK(did.slices_prefetched == 0);
    CHECK(did.slices_missed == 12);
    CHECK(did.demand_bytes == 12 * 128);
    CHECK(did.prefetch_wasted_bytes == did.prefetch_bytes);
    CHECK(did.prefetch_bytes <= 6 * 128);
    if (did.prefetch_bytes == 6 * 128) break;
  }
}

TEST_CASE("streaming brings the next layer while one is executed, and admits nothing") {
  PagerRig rig(kGrid, options_of(0.5, PolicyKind::lru, false, 24));
  const ResidencyVersion first = rig.pager().residency();
  rig.run(same_for_all_layers({0, 1, 2, 3, 4, 5, 6, 7}, true));
  CHECK(rig.failure() == "");
  CHECK(rig.pager().residency() == first);
  const ExpertCounters counters = rig.pager().counters();
  CHECK(counters.slices_missed == 12);  // the first layer's; the others had been asked for before
  CHECK(counters.slices_prefetched == 3 * 12);
  CHECK(counters.demand_bytes == 4 * 12 * 128);
}

TEST_CASE("a slice that comes later gives its slot to one that comes sooner") {
  // Both spare slots hold slices of expert 1 ahead of time; expert 0 comes first.
  PagerRig rig(kGrid, options_of(0, PolicyKind::lru, true, 2));
  for (int pause_ms = 5;; pause_ms *= 2) {
    REQUIRE(pause_ms < 10'000);
    const ExpertCounters before = rig.pager().counters();
    StepVisits step(kGrid.layers);
    step[0].hints = {{1, {1}}};
    step[0].pause_us = pause_ms * 1000;
    step[1].experts = {0, 1};
    rig.run(step);
    REQUIRE(rig.failure() == "");
    const ExpertCounters did = rig.pager().counters() - before;
    CHECK(did.slices_used == 6);
    if (did.prefetch_bytes < 2 * 128) continue;
    CHECK(did.slices_prefetched == 2);
    CHECK(did.prefetch_wasted_bytes ==
          128);  // one was enough: expert 0 goes through its slot, slice by slice
    CHECK(did.demand_bytes == 5 * 128);
    break;
  }
}

TEST_CASE("a pager takes exactly its slots from the device budget, and no run passes a budget") {
  const PagerOptions options = options_of(0.3, PolicyKind::lru, true, 5);
  const uint64_t needed = device_bytes_for(kGrid, options);
  {
    PagerRig rig(kGrid, options);
    std::mt19937 random(4);
    for (int step = 0; step < 20; ++step) rig.run(draw_step(kGrid, {0.2, 0.5}, random));
    CHECK(rig.device().device_budget().peak_bytes() == needed);
    CHECK(rig.device().host_budget().peak_bytes() == rig.pager().store().bytes());
  }
  const auto small = make_cpu_device(needed - 1, 1 << 20);
  CHECK_THROWS_AS(SlicePager(*small, kGrid, options), CapacityError);
  CHECK(small->device_budget().used_bytes() == 0);

  const auto few_hosts = make_cpu_device(needed, kGrid.total_bytes() - 1);
  SlicePager pager(*few_hosts, kGrid, options);
  CHECK_THROWS_AS(pager.load(PatternSource(kGrid), kNoProgress), CapacityError);
  CHECK(few_hosts->host_budget().peak_bytes() < kGrid.total_bytes());
}

TEST_CASE("pinned experts that do not fit are a CapacityError that says how many do") {
  PagerOptions options = options_of(0.25);  // 6 slots a layer: two experts of three slices
  options.pinned = {{1, 0}, {1, 1}, {1, 2}};
  const auto device = make_cpu_device(1 << 20, 1 << 20);
  CHECK_THROWS_WITH_AS(
      SlicePager(*device, kGrid, options),
      doctest::Contains("offload.pin asks for 9 slices of MoE layer 1, but 6 can be resident"),
      CapacityError);
}

TEST_CASE("everything is given back when a pager ends, also with prefetches under way") {
  for (int round = 0; round < 30; ++round) {
    const auto device = make_cpu_device(1 << 20, 1 << 20);
    {
      SlicePager pager(*device, kGrid, options_of(0.2, PolicyKind::lru, true, 64));
      const PatternSource source(kGrid);
      pager.load(source, kNoProgress);
      pager.visit(0, std::vector<int>{0}, false,
                  {{}, [] {}, [](int, int, std::span<const std::byte* const>) {}});
      for (int layer = 1; layer < kGrid.layers; ++layer) pager.hint(layer, {0, 1, 2, 3, 4, 5, 6, 7});
      if (round % 2 == 0) std::this_thread::sleep_for(std::chrono::microseconds(40 * round));
    }
    CHECK(device->device_budget().used_bytes() == 0);
    CHECK(device->host_budget().used_bytes() == 0);
  }
}

TEST_CASE("an error while a slice is used leaves the pager whole") {
  PagerRig rig(kGrid, options_of(0.3, PolicyKind::lru, false, 8));
  LayerWork failing{{},
                    [] {},
                    [](int expert, int, std::span<const std::byte* const>) {
                      if (expert == 2) throw DeviceError("out of order");
                    }};
  CHECK_THROWS_AS(rig.pager().visit(0, std::vector<int>{1, 2}, false, failing), DeviceError);
  rig.pager().between_steps();
  CHECK(rig.pager().consistent());
  int wrong = 0;
  for (int layer = 0; layer < kGrid.layers; ++layer) {
    const LayerWork compare{
        {},
        [] {},
        [&](int expert, int first, std::span<const std::byte* const> slices) {
          rig.device()
              .compute_stream()
              .synchronize();  // The slices are there for the stream, not yet for the host.
          for (const std::byte* at : slices) wrong += !rig.source().matches({layer, expert, first++}, at);
        }};
    rig.pager().visit(layer, std::vector<int>{1, 2, 5}, false, compare);
  }
  rig.pager().between_steps();
  CHECK(wrong == 0);
  CHECK(rig.pager().consistent());
}

TEST_CASE("what the device's share leaves over is neither copied nor visited, and all else is") {
  for (const bool streaming : {false, true}) {
    for (const double share : {0.0, 0.3, 0.5, 1.0}) {
      for (const int spare_slots : {1, 3, 40}) {
        CAPTURE(streaming);
        CAPTURE(share);
        CAPTURE(spare_slots);
        PagerRig rig(kGrid, options_of(0.5, PolicyKind::static_, false,
                                       spare_slots));  // 12 of a layer's 24 are absent
        SlicePager& pager = rig.pager();
        pager.set_device_share(share);
        const long over = std::lround((1 - share) * 12);
        const std::vector<int> experts{0, 1, 2, 3, 4, 5, 6, 7};
        for (int step = 0; step < 3; ++step) {
          const ExpertCounters before = pager.counters();
          for (int layer = 0; layer < kGrid.layers; ++layer) {
            std::vector<SliceId> left, seen;
            bool used = false;
            LayerWork work;
            work.leave = [&](std::span<const SliceId> slices) {
              CHECK_FALSE(used);
              left.assign(slices.begin(), slices.end());
            };
            work.overlap = [] {};
            work.use = [&](int expert, int first, std::span<const std::byte* const> slices) {
              used = true;
              for (const std::byte* at : slices) {
                seen.push_back({layer, expert, first});
                CHECK(rig.source().matches({layer, expert, first++}, at));
              }
            };
            pager.visit(layer, experts, streaming, work);
            CHECK(static_cast<long>(left.size()) == over);
            CHECK(std::ranges::is_sorted(left));
            CHECK(std::ranges::is_sorted(seen));
            CHECK(left.size() + seen.size() == kGrid.slices_per_layer());
            for (const SliceId slice : left) {
              CHECK_FALSE(std::ranges::binary_search(seen, slice));
              CHECK(pager.store().has_home(slice));
            }
          }
          pager.between_steps();
          const ExpertCounters did = pager.counters() - before;
          CHECK(did.bytes_moved() == static_cast<uint64_t>(12 - over) * kGrid.layers * kGrid.slice_bytes);
          CHECK(did.slices_used == kGrid.total_slices());
        }
        CHECK(pager.consistent());
      }
    }
  }
}

TEST_CASE("a model of one expert in one slice pages like any other") {
  const ExpertGrid grid{3, 1, 1, 64};
  PagerOptions options;
  options.residents_per_layer = {0, 1, 0};
  PagerRig rig(grid, options);
  std::mt19937 random(5);
  for (int step = 0; step < 20; ++step) rig.run(draw_step(grid, {0, 1}, random));
  CHECK(rig.failure() == "");
  CHECK(rig.pager().counters().slices_resident == 20);
}

}  // namespace lighter::offload
