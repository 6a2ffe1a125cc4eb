// Replays of hand-made traces, whose counts can be worked out on paper, and of random ones.
#include "offload/replay.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <numeric>
#include <random>

namespace lighter::offload {
namespace {

constexpr uint16_t kOne = 0x3C00;  // in fp16
constexpr uint16_t kMinusTwo = 0xC000;

// One MoE layer, one slice and one expert a token, nobody guesses.
Trace of_one_layer(int experts, const std::vector<int>& chosen) {
  std::vector<uint32_t> positions(chosen.size());
  std::iota(positions.begin(), positions.end(), 0);
  std::vector<uint16_t> values;
  for (const int expert : chosen) {
    values.push_back(static_cast<uint16_t>(expert));
    values.insert(values.end(), experts, 0);
  }
  return {{"test", "bf16", {0}, experts, 1, 1, 100, {}}, positions, values};
}

Trace random_trace(const TraceHeader& header, size_t tokens, std::mt19937& random) {
  const TraceLayout layout(header);
  std::vector<uint32_t> positions(tokens);
  std::vector<uint16_t> values(tokens * layout.values());
  for (auto& value : values) value = static_cast<uint16_t>(random() & 0x3FFF);
  std::vector<int> order(header.experts);
  std::iota(order.begin(), order.end(), 0);
  for (size_t token = 0; token < tokens; ++token) {
    positions[token] = static_cast<uint32_t>(token % 50);
    for (int layer = 0; layer < header.grid().layers; ++layer) {
      // Early ones more often, and some of the last token's again.
      if (random() % 2 == 0) std::shuffle(order.begin(), order.begin() + header.experts / 2, random);
      if (random() % 4 == 0) std::shuffle(order.begin(), order.end(), random);
      uint16_t* experts = &values[token * layout.values() + layout.experts(layer)];
      std::copy_n(order.begin(), header.experts_per_token, experts);
    }
  }
  return {header, positions, values};
}

constexpr std::array kPolicies = {PolicyKind::static_, PolicyKind::lru, PolicyKind::lfu};

// The most hits that any sequence of residents can have: all are tried.
uint64_t most_hits(const std::vector<int>& chosen, size_t token, unsigned resident) {
  if (token == chosen.size()) return 0;
  const unsigned bit = 1u << chosen[token];
  if ((resident & bit) != 0) return 1 + most_hits(chosen, token + 1, resident);
  uint64_t best = most_hits(chosen, token + 1, resident);
  for (unsigned victim = resident; victim != 0; victim &= victim - 1) {
    const unsigned without = resident & ~(victim & (~victim + 1));
    best = std::max(best, most_hits(chosen, token + 1, without | bit));
  }
  return best;
}

}  // namespace

TEST_CASE("a hand-made trace has the hits that one counts on paper") {
  // Experts 0 and 1 are resident at first.
  const Trace trace = of_one_layer(4, {0, 2, 0, 2, 3, 0});
  const std::vector<int> two = residents_for(trace.header().grid(), 0.5);
  REQUIRE(two == std::vector<int>{2});
  const auto counts = [&](PolicyKind policy) { return replay(trace, two, policy, 0); };
  // static: 0 always, 2 and 3 never.
  CHECK(counts(PolicyKind::static_).all == ReplayCounts{6, 3, 0, 3, 0});
  // lru: 2 replaces 1; 3 replaces 0, which comes next.
  CHECK(counts(PolicyKind::lru).all == ReplayCounts{6, 3, 0, 3, 0});
  CHECK(counts(PolicyKind::lru).second_half == ReplayCounts{3, 1, 0, 2, 0});
  // lfu and the clairvoyant one do not admit 3.
  CHECK(counts(PolicyKind::lfu).all == ReplayCounts{6, 4, 0, 2, 0});
  CHECK(replay_clairvoyant(trace, two).all == ReplayCounts{6, 4, 0, 2, 0});
  CHECK(replay_clairvoyant(trace, two).second_half == ReplayCounts{3, 2, 0, 1, 0});
  // 0 and 2 are the first half's hottest.
  CHECK(replay_static_hot(trace, two) == ReplayCounts{3, 2, 0, 1, 0});
  CHECK(counts(PolicyKind::lru).all.moved() == 3);
  CHECK(counts(PolicyKind::lfu).all.hit_rate() == doctest::Approx(4.0 / 6));
  CHECK(repeat_overlap(of_one_layer(4, {1, 1, 2, 2, 3})).all == doctest::Approx(0.5));
}

TEST_CASE("behind the steps, what is missed begins to come with one pass and is resident with the next") {
  // Experts 0 and 1 are resident at first, and 3 is what is needed; passes follow steps 8, 16 and so on.
  const Trace trace = of_one_layer(4, std::vector<int>(40, 3));
  const std::vector<int> two = residents_for(trace.header().grid(), 0.5);
  for (const PolicyKind policy : {PolicyKind::lru, PolicyKind::lfu}) {
    const ReplayResult result = replay_behind(trace, two, policy);
    CHECK(result.all == ReplayCounts{40, 24, 0, 16, 0, 1});
    CHECK(result.second_half == ReplayCounts{20, 20, 0, 0, 0, 0});
    CHECK(result.all.moved() == 17);
  }
  CHECK(replay_behind(trace, two, PolicyKind::static_).all == ReplayCounts{40, 0, 0, 40, 0, 0});
}

TEST_CASE("a right guess is a hit in time, a wrong one is wasted, and none is made twice") {
  // Two layers of four experts, of which expert 0 is resident. Layer 0 always takes 0.
  const TraceHeader header{"test", "bf16", {0, 1}, 4, 1, 1, 100, {1}};
  const std::vector<std::pair<int, int>> chosen_and_guessed = {{2, 2}, {3, 1}, {0, 0}, {0, 3}};
  std::vector<uint32_t> positions;
  std::vector<uint16_t> values;
  for (const auto& [chosen, guessed] : chosen_and_guessed) {
    positions.push_back(static_cast<uint32_t>(positions.size()));
    values.insert(values.end(), {0, 0, 0, 0, 0});
    values.insert(values.end(), {static_cast<uint16_t>(chosen), 0, 0, 0, 0});
    for (int expert = 0; expert < 4; ++expert) values.push_back(expert == guessed ? kOne : kMinusTwo);
  }
  const Trace trace(header, positions, values);
  const ReplayCounts counts = replay(trace, {1, 1}, PolicyKind::static_, 1).all;
  CHECK(counts == ReplayCounts{8, 6, 1, 1, 2});
  CHECK(counts.hit_rate_in_time() == doctest::Approx(7.0 / 8));
  CHECK(counts.moved() == 4);
  CHECK(replay(trace, {1, 1}, PolicyKind::static_, 0).all == ReplayCounts{8, 6, 0, 2, 0});
  const GuessQuality quality = guess_overlap(trace, 1);
  CHECK_FALSE(quality.layers[0].has_value());
  CHECK(*quality.layers[1] == doctest::Approx(0.5));
  CHECK(quality.all == doctest::Approx(0.5));
}

TEST_CASE("the clairvoyant replay is the best there is") {
  std::mt19937 random(3);
  for (int round = 0; round < 100; ++round) {
    std::vector<int> chosen(9);
    for (int& expert : chosen) expert = static_cast<int>(random() % 5);
    const Trace trace = of_one_layer(5, chosen);
    CHECK(replay_clairvoyant(trace, {2}).all.resident == most_hits(chosen, 0, 0b11));
  }
}

TEST_CASE("no policy passes the clairvoyant replay, and all count the same uses") {
  std::mt19937 random(20261123);
  for (int round = 0; round < 60; ++round) {
    const int experts = 2 + static_cast<int>(random() % 15);
    const int k = 1 + static_cast<int>(random() % std::min(experts, 3));
    const int slices = 1 + static_cast<int>(random() % 5);
    const TraceHeader header{"test", "bf16", {0, 1, 2}, experts, k, slices, 100, {1, 2}};
    const Trace trace = random_trace(header, 300, random);
    const auto residents = residents_for(header.grid(), static_cast<double>(random() % 11) / 10);
    const ReplayResult best = replay_clairvoyant(trace, residents);
    CHECK(best.all.used == trace.tokens() * 3 * k * slices);
    CHECK(best.all.used == best.all.resident + best.all.missed);
    CHECK(best.second_half.used == best.all.used / 2);
    for (const PolicyKind policy : kPolicies) {
      const ReplayResult result = replay(trace, residents, policy, 0);
      CAPTURE(static_cast<int>(policy));
      CHECK(result.all.resident <= best.all.resident);
      CHECK(result.all.used == best.all.used);
      CHECK(result.all.used == result.all.resident + result.all.missed);
      CHECK(result.all.moved() == result.all.missed);
      for (const int depth : {1, 2}) {
        const ReplayCounts ahead = replay(trace, residents, policy, depth).all;
        CHECK(ahead.used == ahead.resident + ahead.prefetched + ahead.missed);
        if (policy == PolicyKind::static_) CHECK(ahead.resident == result.all.resident);
      }
    }
  }
}

TEST_CASE("with everything resident nothing is missed, and with nothing resident everything is") {
  std::mt19937 random(5);
  const TraceHeader header{"test", "bf16", {0, 1}, 4, 2, 3, 100, {1}};
  const Trace trace = random_trace(header, 40, random);
  for (const PolicyKind policy : kPolicies) {
    CHECK(replay(trace, {12, 12}, policy, 1).all == ReplayCounts{480, 480, 0, 0, 0});
    CHECK(replay(trace, {0, 0}, policy, 0).all == ReplayCounts{480, 0, 0, 480, 0});
  }
  CHECK(replay_clairvoyant(trace, {12, 12}).all.missed == 0);
  CHECK(replay_clairvoyant(trace, {0, 0}).all.resident == 0);
  CHECK(replay_static_hot(trace, {12, 12}).missed == 0);
}

TEST_CASE("the likeliest experts by fp16 bits are the likeliest by value") {
  const std::vector<uint16_t> logits = {0x8000, 0xBC00, 0x3C00, 0x3C01, 0xC000, 0x0001, 0x3C01};
  CHECK(top_experts(logits, 4) == std::vector<int>{3, 6, 2, 5});
  CHECK(top_experts(logits, 7) == std::vector<int>{3, 6, 2, 5, 0, 1, 4});
  CHECK(top_experts({}, 2).empty());
}

}  // namespace lighter::offload
