#include "offload/eviction_policy.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace lighter::offload {
namespace {

constexpr ExpertGrid kGrid{2, 8, 4, 64};

std::vector<SliceId> slices_of(std::vector<int> experts, int slice = 0, int layer = 0) {
  std::vector<SliceId> slices;
  for (const int expert : experts) slices.push_back({layer, expert, slice});
  return slices;
}

// The expert that leaves for `incoming`, or -1.
int leaves(const EvictionPolicy& policy, int incoming, const std::vector<SliceId>& candidates,
           int layer = 0) {
  const auto victim = policy.victim({layer, incoming}, candidates);
  return victim ? candidates.at(*victim).expert : -1;
}

}  // namespace

TEST_CASE("no policy evicts where there is no candidate") {
  for (const PolicyKind kind : {PolicyKind::static_, PolicyKind::lru, PolicyKind::lfu}) {
    const auto policy = make_policy(kind, kGrid);
    policy->touch({0, 0}, 1);
    CHECK_FALSE(policy->victim({0, 0}, {}).has_value());
  }
}

TEST_CASE("static evicts nothing, whatever is used") {
  const auto policy = make_policy(PolicyKind::static_, kGrid);
  for (uint64_t step = 1; step < 100; ++step) policy->touch({0, 5}, step);
  CHECK(leaves(*policy, 5, slices_of({0, 1, 2})) == -1);
}

TEST_CASE("lru evicts what was used least recently") {
  const auto policy = make_policy(PolicyKind::lru, kGrid);
  for (const auto& [expert, step] : {std::pair{0, 3}, {1, 5}, {2, 1}, {0, 7}, {4, 8}})
    policy->touch({0, expert}, step);
  CHECK(leaves(*policy, 4, slices_of({0, 1, 2})) == 2);
  CHECK(leaves(*policy, 4, slices_of({0, 1})) == 1);
  policy->touch({0, 1}, 9);
  CHECK(leaves(*policy, 4, slices_of({0, 1})) == 0);
}

TEST_CASE("lru evicts what was never used before anything else, even when that was used at step 0") {
  const auto policy = make_policy(PolicyKind::lru, kGrid);
  policy->touch({0, 0}, 0);
  CHECK(leaves(*policy, 4, slices_of({0, 3})) == 3);
}

TEST_CASE("an expert shrinks from its last slice") {
  for (const PolicyKind kind : {PolicyKind::lru, PolicyKind::lfu}) {
    const auto policy = make_policy(kind, kGrid);
    policy->touch({0, 7}, 1);
    const std::vector<SliceId> candidates = {{0, 1, 0}, {0, 1, 3}, {0, 1, 2}};
    CHECK(policy->victim({0, 7}, candidates) == 1);
  }
}

TEST_CASE("the layers of a model do not influence each other") {
  for (const PolicyKind kind : {PolicyKind::lru, PolicyKind::lfu}) {
    const auto policy = make_policy(kind, kGrid);
    for (uint64_t step = 1; step < 5; ++step) policy->touch({1, 0}, step);
    policy->touch({0, 1}, 5);
    policy->touch({0, 7}, 6);
    CHECK(leaves(*policy, 7, slices_of({0, 1})) == 0);
  }
}

TEST_CASE("lfu evicts what was used least often, not what was used least recently") {
  const auto policy = make_policy(PolicyKind::lfu, kGrid);
  for (uint64_t step = 1; step <= 3; ++step) policy->touch({0, 0}, step);
  policy->touch({0, 1}, 4);
  for (uint64_t step = 5; step <= 6; ++step) policy->touch({0, 2}, step);
  CHECK(leaves(*policy, 2, slices_of({0, 1})) == 1);
}

TEST_CASE("lfu does not admit what is used less often than all residents") {
  const auto policy = make_policy(PolicyKind::lfu, kGrid);
  for (uint64_t step = 1; step <= 3; ++step) {
    policy->touch({0, 0}, step);
    policy->touch({0, 1}, step);
  }
  policy->touch({0, 2}, 4);
  CHECK(leaves(*policy, 2, slices_of({0, 1})) == -1);
  policy->touch({0, 2}, 5);
  policy->touch({0, 2}, 6);
  CHECK(leaves(*policy, 2, slices_of({0, 1})) != -1);
}

TEST_CASE("lfu forgets: a use counts half after 256 steps") {
  const auto policy = make_policy(PolicyKind::lfu, kGrid);
  for (uint64_t step = 1; step <= 8; ++step) policy->touch({0, 0}, step);  // 8 uses
  policy->touch({0, 1}, 9);
  CHECK(leaves(*policy, 1, slices_of({0})) == -1);
  // Three half-lives later the eight count as a little less than one; one new use is more.
  policy->touch({0, 1}, 9 + 3 * 256);
  CHECK(leaves(*policy, 1, slices_of({0})) == 0);
  // Two half-lives would not be enough: 2 against 1.
  const auto early = make_policy(PolicyKind::lfu, kGrid);
  for (uint64_t step = 1; step <= 8; ++step) early->touch({0, 0}, step);
  early->touch({0, 1}, 8 + 2 * 256);
  CHECK(leaves(*early, 1, slices_of({0})) == -1);
}

TEST_CASE("the victim is always a candidate, and the same uses always choose the same one") {
  for (const PolicyKind kind : {PolicyKind::static_, PolicyKind::lru, PolicyKind::lfu}) {
    const auto one = make_policy(kind, kGrid);
    const auto other = make_policy(kind, kGrid);
    std::mt19937 random(7);
    for (uint64_t step = 1; step < 2000; ++step) {
      const int used = static_cast<int>(random() % kGrid.experts);
      one->touch({0, used}, step);
      other->touch({0, used}, step);
      std::vector<SliceId> candidates;
      for (int expert = 0; expert < kGrid.experts; ++expert) {
        if (expert != used && random() % 2 == 0)
          candidates.push_back({0, expert, static_cast<int>(random() % 4)});
      }
      const auto victim = one->victim({0, used}, candidates);
      REQUIRE(victim == other->victim({0, used}, candidates));
      if (victim) REQUIRE(*victim < candidates.size());
    }
  }
}

}  // namespace lighter::offload
