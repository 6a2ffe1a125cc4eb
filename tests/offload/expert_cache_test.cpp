// The cache as a list of promises. The sequences of calls are those of SlicePager, without its bytes.
#include "offload/expert_cache.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <random>
#include <set>
#include <utility>

#include "runtime/error.h"

namespace lighter::offload {
namespace {

constexpr ExpertGrid kGrid{3, 6, 2, 64};
std::byte* const kBase = reinterpret_cast<std::byte*>(uintptr_t{1} << 20);

// Striped: slice 0 of every expert first. The first `pinned` placed slices of each layer never leave.
ExpertCache make_cache(int residents, int spare_slots, PolicyKind policy = PolicyKind::lru, int pinned = 0) {
  const std::vector<int> per_layer(kGrid.layers, residents);
  ExpertCache cache(kGrid, per_layer, spare_slots, make_policy(policy, kGrid), 0, kBase);
  for (int layer = 0; layer < kGrid.layers; ++layer) {
    for (int i = 0; i < residents; ++i) {
      cache.place({layer, i % kGrid.experts, i / kGrid.experts}, i < pinned);
    }
  }
  cache.end_step();
  return cache;
}

std::vector<SliceNeed> begin(ExpertCache& cache, int layer, const std::vector<int>& experts) {
  std::vector<int> dropped;
  return cache.begin_layer(layer, experts, dropped);
}

int residents_of(const ResidencyTable& table, int layer) {
  int count = 0;
  for (int expert = 0; expert < kGrid.experts; ++expert) {
    for (int i = 0; i < kGrid.slices; ++i) count += table.at({layer, expert, i}).on_device();
  }
  return count;
}

// The slots that the running step reads by its version: those of the layers to come, and of `experts` in
// `layer`.
std::set<int> protected_slots(const ResidencyTable& table, int layer, const std::vector<int>& experts) {
  std::set<int> slots;
  for (int l = layer; l < kGrid.layers; ++l) {
    for (int expert = 0; expert < kGrid.experts; ++expert) {
      if (l == layer && std::find(experts.begin(), experts.end(), expert) == experts.end()) continue;
      for (int i = 0; i < kGrid.slices; ++i) {
        if (table.at({l, expert, i}).on_device()) slots.insert(table.at({l, expert, i}).slot);
      }
    }
  }
  return slots;
}

}  // namespace

TEST_CASE("before anything is placed, nothing is resident") {
  const std::vector<int> per_layer(kGrid.layers, 4);
  ExpertCache cache(kGrid, per_layer, 2, make_policy(PolicyKind::lru, kGrid), 0, kBase);
  CHECK(cache.slots() == 3 * 4 + 2);
  CHECK(cache.residency()->version == 0);
  for (int layer = 0; layer < kGrid.layers; ++layer) CHECK(residents_of(*cache.residency(), layer) == 0);
  CHECK(cache.consistent());
}

TEST_CASE("a layer takes as many residents as planned and not one more") {
  ExpertCache cache = make_cache(4, 1);
  CHECK_THROWS_AS(cache.place({1, 5, 1}, false), CapacityError);
  CHECK(cache.consistent());
  CHECK(cache.residency()->version == 1);
  CHECK(residents_of(*cache.residency(), 1) == 4);
}

TEST_CASE("every slot has an address of its own, a slice apart") {
  ExpertCache cache = make_cache(4, 3);
  std::set<const std::byte*> addresses;
  for (const SliceLocation& at : cache.residency()->locations) {
    if (!at.on_device()) continue;
    CHECK(at.address == kBase + static_cast<size_t>(at.slot) * kGrid.slice_bytes);
    addresses.insert(at.address);
  }
  CHECK(addresses.size() == 12);
}

TEST_CASE("the slices of a layer come in ascending order of expert and slice") {
  ExpertCache cache = make_cache(4, 2);
  const auto needs = begin(cache, 1, {0, 3, 5});
  REQUIRE(needs.size() == 6);
  for (int i = 0; i < 6; ++i) CHECK(needs[i].slice == SliceId{1, std::array{0, 3, 5}[i / 2], i % 2});
  CHECK(needs[0].presence == Presence::resident);
  CHECK(needs[1].presence == Presence::absent);
  CHECK(needs[4].presence == Presence::absent);
}

TEST_CASE("what is admitted is resident from the next version on, in the slot it was fetched to") {
  ExpertCache cache = make_cache(4, 1);
  const ResidencyVersion before = cache.residency();
  begin(cache, 0, {5});
  bool stolen = true;
  const auto slot = cache.take({0, 5, 0}, stolen);
  REQUIRE(slot.has_value());
  CHECK_FALSE(stolen);
  cache.try_admit({0, 5, 0});
  cache.release({0, 5, 0});
  CHECK(cache.free_slots() == 1);  // the victim's
  CHECK(cache.residency() == before);
  CHECK_FALSE(before->at({0, 5, 0}).on_device());
  cache.end_step();
  CHECK(cache.residency()->version == before->version + 1);
  CHECK(cache.residency()->at({0, 5, 0}).slot == *slot);
  CHECK(residents_of(*cache.residency(), 0) == 4);
  CHECK(cache.evictions() == 1);
  CHECK(cache.consistent());
}

TEST_CASE("a step that changes nothing publishes no new version") {
  ExpertCache cache = make_cache(4, 1, PolicyKind::static_);
  const ResidencyVersion before = cache.residency();
  begin(cache, 0, {5});
  bool stolen = false;
  cache.take({0, 5, 0}, stolen);
  cache.try_admit({0, 5, 0});
  cache.release({0, 5, 0});
  CHECK(cache.end_step() == before);
  CHECK(cache.free_slots() == 1);
}

TEST_CASE("an expert that the layer needs is never the victim") {
  ExpertCache cache = make_cache(2, 4);  // slice 0 of experts 0 and 1
  begin(cache, 0, {0, 1, 5});
  bool stolen = false;
  cache.take({0, 5, 0}, stolen);
  cache.try_admit({0, 5, 0});
  CHECK(cache.evictions() == 0);
  cache.release({0, 5, 0});
  CHECK(cache.free_slots() == 4);
}

TEST_CASE("what has just been admitted is not evicted in the same layer") {
  ExpertCache cache = make_cache(1, 3);
  begin(cache, 0, {4, 5});
  bool stolen = false;
  for (const SliceId slice : {SliceId{0, 4, 0}, SliceId{0, 4, 1}, SliceId{0, 5, 0}}) {
    REQUIRE(cache.take(slice, stolen));
    cache.try_admit(slice);
  }
  CHECK(cache.evictions() == 1);
  CHECK(cache.consistent());
}

TEST_CASE("when all spare slots are in use by the layer, there is no slot") {
  ExpertCache cache = make_cache(0, 2);
  begin(cache, 0, {0, 1});
  bool stolen = false;
  CHECK(cache.take({0, 0, 0}, stolen));
  CHECK(cache.take({0, 0, 1}, stolen));
  CHECK_FALSE(cache.take({0, 1, 0}, stolen));
  cache.release({0, 0, 0});
  CHECK(cache.take({0, 1, 0}, stolen));
}

TEST_CASE("a prefetch takes idle slots only, and no slice twice") {
  ExpertCache cache = make_cache(4, 2);
  begin(cache, 0, {5});
  bool stolen = false;
  cache.take({0, 5, 0}, stolen);
  CHECK(cache.take_for_prefetch({1, 5, 0}));
  CHECK_FALSE(cache.take_for_prefetch({1, 5, 0}));  // on its way
  CHECK_FALSE(cache.take_for_prefetch({1, 5, 1}));  // nothing idle
  cache.release({0, 5, 0});
  CHECK_FALSE(cache.take_for_prefetch({1, 0, 0}));  // resident
  CHECK(cache.take_for_prefetch({1, 5, 1}));
  CHECK(cache.evictions() == 0);
  CHECK(cache.consistent());
}

TEST_CASE("a demand takes the slot of the latest guess") {
  ExpertCache cache = make_cache(0, 2);
  begin(cache, 0, {0});
  const auto first = cache.take_for_prefetch({1, 3, 0});
  const auto second = cache.take_for_prefetch({2, 3, 0});
  bool stolen = false;
  CHECK(cache.take({0, 0, 0}, stolen) == second);
  CHECK(stolen);
  CHECK(cache.take({0, 0, 1}, stolen) == first);
  CHECK(stolen);
  CHECK_FALSE(cache.take({0, 1, 0}, stolen));
  CHECK(cache.consistent());
  cache.release({0, 0, 0});
  cache.release({0, 0, 1});
  CHECK(begin(cache, 1, {3})[0].presence == Presence::absent);
}

TEST_CASE("a guess that came true is arriving; one that did not is dropped when its layer begins") {
  ExpertCache cache = make_cache(0, 4);
  begin(cache, 0, {});
  const auto right = cache.take_for_prefetch({1, 2, 1});
  const auto wrong = cache.take_for_prefetch({1, 4, 0});
  cache.take_for_prefetch({2, 4, 0});
  std::vector<int> dropped;
  const auto needs = cache.begin_layer(1, std::vector<int>{2}, dropped);
  CHECK(needs[0].presence == Presence::absent);
  CHECK(needs[1].presence == Presence::arriving);
  CHECK(needs[1].slot == right);
  CHECK(dropped == std::vector<int>{*wrong});
  CHECK(cache.consistent());
  // What the layer waits for is safe from its own demands; the guess for a later layer is not.
  cache.take_for_prefetch({2, 5, 0});
  cache.take_for_prefetch({2, 5, 1});
  REQUIRE(cache.free_slots() == 0);
  bool stolen = false;
  for (const SliceId slice : {SliceId{1, 2, 0}, SliceId{1, 0, 0}, SliceId{1, 0, 1}}) {
    CHECK(cache.take(slice, stolen) != right);
    CHECK(stolen);
  }
  CHECK_FALSE(cache.take({1, 1, 0}, stolen));
  cache.release({1, 2, 1});
  CHECK(cache.consistent());
}

TEST_CASE("guesses left over by a step that broke off are dropped at the next layer") {
  ExpertCache cache = make_cache(0, 2);
  begin(cache, 0, {});
  cache.take_for_prefetch({1, 2, 0});
  cache.end_step();
  std::vector<int> dropped;
  cache.begin_layer(2, std::vector<int>{1}, dropped);
  CHECK(dropped.size() == 1);
  CHECK(cache.free_slots() == 2);
}

TEST_CASE("an arriving slice can give its slot up, an admitted one cannot") {
  ExpertCache cache = make_cache(2, 2);
  begin(cache, 0, {});
  cache.take_for_prefetch({1, 5, 0});
  cache.take_for_prefetch({1, 5, 1});
  begin(cache, 1, {5});
  cache.try_admit({1, 5, 0});
  CHECK_FALSE(cache.give_up({1, 5, 0}));
  CHECK(cache.give_up({1, 5, 1}));
  CHECK(cache.free_slots() == 2);
  CHECK(cache.consistent());
}

TEST_CASE(
    "after any sequence: no slot lost, no protected slot handed out, pinned stay, versions stand still") {
  std::mt19937 random(11);
  const auto chance = [&](int percent) { return static_cast<int>(random() % 100) < percent; };
  for (int round = 0; round < 60; ++round) {
    const auto policy = std::array{PolicyKind::static_, PolicyKind::lru, PolicyKind::lfu}[round % 3];
    const int residents = static_cast<int>(random() % 13);
    const int pinned = residents == 0 ? 0 : static_cast<int>(random() % residents);
    ExpertCache cache = make_cache(residents, 1 + static_cast<int>(random() % 8), policy, pinned);
    std::vector<std::pair<ResidencyVersion, ResidencyTable>> published;
    for (int step = 0; step < 40; ++step) {
      const ResidencyVersion version = cache.residency();
      published.emplace_back(version, *version);
      for (int layer = 0; layer < kGrid.layers; ++layer) {
        std::vector<int> experts;
        for (int expert = 0; expert < kGrid.experts; ++expert) {
          if (chance(40)) experts.push_back(expert);
        }
        const std::set<int> safe = protected_slots(*version, layer, experts);
        const auto guess = [&] {
          if (layer + 1 == kGrid.layers || !chance(30)) return;
          const int ahead = layer + 1 + static_cast<int>(random() % (kGrid.layers - layer - 1));
          const auto slot = cache.take_for_prefetch({ahead, static_cast<int>(random() % 6), chance(50)});
          if (slot) REQUIRE_FALSE(safe.contains(*slot));
        };
        auto needs = begin(cache, layer, experts);
        std::set<int> held;
        for (SliceNeed& need : needs) {
          if (need.presence == Presence::resident) {
            REQUIRE(version->at(need.slice).slot == need.slot);
          } else if (need.presence == Presence::arriving) {
            REQUIRE_FALSE(safe.contains(need.slot));
            if (chance(70)) cache.try_admit(need.slice);
          }
          if (need.slot >= 0) held.insert(need.slot);
        }
        REQUIRE(cache.consistent());
        for (size_t i = 0; i < needs.size(); ++i) {
          SliceNeed& need = needs[i];
          while (need.slot < 0) {
            bool stolen = false;
            if (const auto slot = cache.take(need.slice, stolen)) {
              REQUIRE_FALSE(safe.contains(*slot));
              REQUIRE_FALSE(held.contains(*slot));
              need.slot = *slot;
              held.insert(*slot);
              if (chance(70)) cache.try_admit(need.slice);
              continue;
            }
            const auto gives_way =
                std::find_if(needs.begin() + static_cast<long>(i) + 1, needs.end(), [&](SliceNeed& other) {
                  return other.presence == Presence::arriving && other.slot >= 0 &&
                         cache.give_up(other.slice);
                });
            REQUIRE(gives_way != needs.end());
            held.erase(std::exchange(gives_way->slot, -1));
          }
          guess();
          if (need.presence != Presence::resident) {
            cache.release(need.slice);
            held.erase(need.slot);
          }
          guess();
          REQUIRE(cache.consistent());
        }
        REQUIRE(cache.residency() == version);
      }
      cache.end_step();
      const ResidencyTable& now = *cache.residency();
      for (int layer = 0; layer < kGrid.layers; ++layer) {
        REQUIRE(residents_of(now, layer) == residents);
        for (int i = 0; i < pinned; ++i) {
          const SliceId slice{layer, i % kGrid.experts, i / kGrid.experts};
          REQUIRE(now.at(slice).slot == published.front().second.at(slice).slot);
        }
      }
    }
    for (const auto& [version, copy] : published) {
      for (size_t i = 0; i < copy.locations.size(); ++i) {
        REQUIRE(version->locations[i].slot == copy.locations[i].slot);
        REQUIRE(version->locations[i].address == copy.locations[i].address);
      }
    }
  }
}

}  // namespace lighter::offload
