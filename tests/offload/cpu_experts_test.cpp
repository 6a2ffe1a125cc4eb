#include "offload/cpu_experts.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>

#include "offload/team_layers.h"
#include "offload/work_claims.h"
#include "runtime/error.h"
#include "runtime/quant/slice_reference.h"
#include "tests/message_of.h"
#include "tests/offload/cpu_experts_rig.h"

namespace lighter::offload {
namespace {

namespace reference = slice_reference;

// Tokens that choose experts at random: [expert] → uses.
std::vector<std::vector<TokenUse>> random_routing(int tokens, int experts, int k, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> weight(0.1f, 1.0f);
  std::vector<std::vector<TokenUse>> uses(experts);
  std::vector<int> order(experts);
  for (int e = 0; e < experts; ++e) order[e] = e;
  for (int token = 0; token < tokens; ++token) {
    std::shuffle(order.begin(), order.end(), random);
    for (int i = 0; i < k; ++i) uses[order[i]].push_back({token, weight(random), weight(random)});
  }
  return uses;
}

}  // namespace

TEST_CASE("a phase's pieces cover its work once, get smaller, and end small") {
  for (const int workers : {1, 2, 7, 15}) {
    for (const int64_t total : {0, 1, 5, 40, 320, 27648, 1000003}) {
      for (const int64_t least : {1, 2, 36, 5000}) {
        CAPTURE(workers);
        CAPTURE(total);
        CAPTURE(least);
        const WorkPieces pieces(total, least, workers);
        WorkClaims claims;
        claims.begin(workers);
        int64_t smallest = total, largest = 0;
        std::vector<int> taken(total);
        for (WorkPiece piece; claims.take(pieces, piece);) {
          REQUIRE(piece.begin < piece.end);
          for (int64_t i = piece.begin; i < piece.end; ++i) ++taken[i];
          smallest = std::min(smallest, piece.end - piece.begin);
          largest = std::max(largest, piece.end - piece.begin);
        }
        CHECK(std::ranges::count(taken, 1) == total);
        CHECK(smallest <= least + 1);
        if (total > 2 * least * workers) CHECK(largest <= total / workers / 2 + 1);
        WorkPiece none;
        CHECK_FALSE(claims.take(pieces, none));
        claims.begin(workers);
        CHECK(claims.take(pieces, none) == (total > 0));
      }
    }
  }
}

TEST_CASE("a piece is handed over once, whoever computes it") {
  WorkClaims claims;
  const WorkPieces pieces(100, 1, 2);
  for (int time = 0; time < 3; ++time) {
    claims.begin(2);
    CHECK(claims.taken(pieces) == 0);
    WorkPiece piece;
    REQUIRE(claims.take(pieces, piece));
    REQUIRE(claims.take(pieces, piece));
    CHECK(piece.number == 1);
    CHECK(claims.taken(pieces) == 2);
    CHECK_FALSE(claims.is_handed_over(1));
    CHECK(claims.take_again(1, false));
    CHECK_FALSE(claims.take_again(1, false));  // somebody does already
    CHECK(claims.take_again(1, true));
    CHECK(claims.may_hand_over(1));
    CHECK_FALSE(claims.may_hand_over(1));
    CHECK(claims.is_handed_over(1));
    CHECK_FALSE(claims.take_again(1, true));
    CHECK_FALSE(claims.is_handed_over(0));
    while (claims.take(pieces, piece)) {
    }
    CHECK(claims.taken(pieces) == pieces.count());
  }
}

TEST_CASE("a layer stays where it is while a worker holds it, however far the others are") {
  TeamLayers layers(3);
  layers.reset(640, false);
  TeamLayer* const held = layers.hold(2, 1);
  REQUIRE(held != nullptr);
  CHECK(layers.hold(1, 3) == nullptr);
  CHECK_FALSE(layers.over(3));
  std::set<const TeamLayer*> places;
  for (uint64_t number = 1; number < 100; ++number) {
    CHECK_FALSE(layers.over(number));
    TeamLayer* const layer = layers.hold(0, number);
    REQUIRE(layer != nullptr);
    CHECK((layer == held) == (number == 1));
    places.insert(layer);
    layers.complete(*layer);
    CHECK(layers.over(number));
  }
  CHECK(places.size() < 6);  // the same ones, which are in cache
  CHECK(held->number == 1);
  CHECK(held->values.size() == 640);
  CHECK(layers.hold(1, 1) == nullptr);
  CHECK(layers.over(1));
  layers.release(2, 1);
  for (uint64_t number = 100; held->number == 1 && number < 110; ++number) {
    layers.complete(*layers.hold(0, number));
  }
  CHECK(held->number > 1);
}

TEST_CASE(
    "for one token the CPU's experts equal the slice kernel bit for bit, whatever their number of workers") {
  unsigned seed = 3000;
  for (const auto encoding : kEncodings) {
    const Model model(encoding, 1, 5, seed += 100);
    const auto x = normal(kHidden, 1, seed + 1);
    Values expected(kHidden, 0.0f);
    CpuScratch scratch;
    for (int part = 0; part < 5; ++part) {
      model.kernel.accumulate(model.slice(0, part), x.data(), 1, expected.data(), scratch);
    }
    const CpuJobs jobs = model.jobs_of(0);
    for (const int threads : {1, 2, 3, 5}) {
      CAPTURE(threads);
      CpuExperts cpu(with_threads(threads));
      CHECK(computed(cpu, jobs, x) == expected);
    }
  }
}

TEST_CASE("many tokens with different experts get the weighted sum of their experts") {
  unsigned seed = 4000;
  for (const auto encoding : kEncodings) {
    for (const auto& [tokens, k] : {std::pair{3, 1}, {16, 2}, {45, 1}}) {
      CAPTURE(tokens);
      const Model model(encoding, 4, 2, seed += 100);
      const auto x = normal(tokens * kHidden, 1, seed + 1);
      const auto routing = random_routing(tokens, 4, k, seed + 2);
      CpuJobs jobs;
      jobs.clear(model.kernel);
      std::vector<double> expected(x.size());
      for (int expert = 0; expert < 4; ++expert) {
        if (routing[expert].empty()) continue;
        model.add(jobs, expert, routing[expert]);
        std::vector<double> chosen;
        for (const auto& use : routing[expert]) {
          for (int64_t i = 0; i < kHidden; ++i) {
            chosen.push_back(double{x[use.token * kHidden + i]} * use.in_weight);
          }
        }
        for (int part = 0; part < 2; ++part) {
          const std::byte* slice = model.slice(expert, part);
          const auto& layout = model.kernel.layout();
          const auto out = reference::down(layout, slice, reference::gate_up(layout, slice, chosen));
          for (size_t u = 0; u < routing[expert].size(); ++u) {
            for (int64_t i = 0; i < kHidden; ++i) {
              expected[routing[expert][u].token * kHidden + i] +=
                  out[u * kHidden + i] * routing[expert][u].out_weight;
            }
          }
        }
      }
      CpuExperts alone(with_threads(1)), together(with_threads(3));
      const auto result = computed(alone, jobs, x);
      CHECK(reference::relative_l2(result, expected) < 0.02);
      CHECK(computed(together, jobs, x) == result);
    }
  }
}

TEST_CASE("column ranges of a slice add up to the whole") {
  unsigned seed = 5000;
  for (const auto encoding : kEncodings) {
    const int64_t group = group_size(encoding);
    const Model model(encoding, 1, 1, seed += 100);
    const TokenUse uses[] = {{0, 1, 1}, {1, 0.5f, 1}, {2, 1, 2}};
    const auto x = normal(3 * kHidden, 1, seed + 1);
    CpuExperts cpu(with_threads(2));
    const auto sum_of = [&](const std::vector<SliceColumns>& ranges) {
      CpuJobs jobs;
      jobs.clear(model.kernel);
      const int expert = jobs.add_expert(uses);
      for (const auto range : ranges) jobs.add_job(expert, model.slice(0, 0), range);
      return computed(cpu, jobs, x);
    };
    const auto whole = sum_of({{0, kWidth}});
    // Odd numbers of groups and odd beginnings included.
    for (const int64_t cut : {group, 2 * group, 3 * group, kWidth - group}) {
      CAPTURE(cut);
      CHECK(reference::relative_l2(sum_of({{0, cut}, {cut, kWidth}}), doubles(whole)) < 1e-6);
    }
    CHECK(reference::relative_l2(sum_of({{0, group}, {group, 2 * group}, {2 * group, kWidth}}),
                                 doubles(whole)) < 1e-6);
    CHECK(reference::relative_l2(sum_of({{0, group}}), doubles(whole)) > 0.1);
  }
}

TEST_CASE("all CPU paths give the same bits for ranges of columns and any rows") {
  if (supported_cpu_paths().back() < CpuPath::avx512_vnni) {
    MESSAGE("this processor has no AVX-512 VNNI: that path is not tested here");
  }
  unsigned seed = 5500;
  for (const auto encoding : kEncodings) {
    const int64_t group = group_size(encoding);
    const RandomSlice slice(encoding, kHidden, kWidth, seed += 100);
    for (const int64_t tokens : {1, 3, 4}) {
      const auto x = normal(tokens * kHidden, 1, seed + 1);
      for (const SliceColumns columns : {SliceColumns{group, 2 * group}, {group, kWidth}, {0, 3 * group}}) {
        std::vector<Values> results;
        for (const CpuPath path : supported_cpu_paths()) {
          if (path == CpuPath::amx && tokens >= cpu_kernels::kAmxTokens) continue;  // another order of sums
          const CpuSliceKernel kernel(encoding, kHidden, kWidth, path);
          const std::byte* bytes = slice.bytes.data();
          PrefetchStream ahead;
          QuantizedActivations input, hidden;
          kernel.quantize_input(x.data(), tokens, input);
          const int32_t index[] = {3, 0, 2, 1};
          Values values(tokens * columns.count()), sums(tokens * kHidden, 0.5f);
          const cpu_kernels::Tokens chosen{input, tokens == 4 ? index : nullptr, tokens};
          const int64_t cut = columns.begin + 23;  // in the midst of a block
          kernel.gate_up(bytes, chosen, columns.begin, cut, values.data(), columns.count(), ahead);
          kernel.gate_up(bytes, chosen, cut, columns.end, values.data() + 23, columns.count(), ahead);
          hidden.assign(encoding, values.data(), tokens, columns.count());
          for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 37}, {37, kHidden}}) {
            const DownOutput out{sums.data() + begin, kHidden, nullptr, nullptr};
            kernel.down(bytes, columns, {hidden, nullptr, tokens}, begin, end, out, ahead);
          }
          values.insert(values.end(), sums.begin(), sums.end());
          results.push_back(std::move(values));
        }
        for (const auto& result : results) CHECK(result == results.front());
      }
    }
  }
}

TEST_CASE("a range of columns reads nothing behind the slice") {
  for (const auto encoding : kEncodings) {
    const int64_t group = group_size(encoding);
    const Model model(encoding, 1, 1, 5900);
    // Whatever lies there, were it read, would show: NaN in every format.
    std::vector<std::byte> bytes(model.slice(0, 0), model.slice(0, 0) + model.kernel.layout().bytes);
    bytes.resize(bytes.size() + 256, std::byte{0xFF});
    const auto x = normal(kHidden, 1, 5901);
    CpuJobs jobs;
    const TokenUse use;
    CpuExperts cpu(with_threads(1));
    const auto last_columns = [&](const std::byte* slice) {
      jobs.clear(model.kernel);
      jobs.add_job(jobs.add_expert({&use, 1}), slice, {kWidth - group, kWidth});
      return computed(cpu, jobs, x);
    };
    CHECK(last_columns(bytes.data()) == last_columns(model.slice(0, 0)));
  }
}

TEST_CASE("the caller is free while a batch is computed, and no jobs make zeros") {
  const Model model(SliceEncoding::int8, 2, 1, 6000);
  const auto x = normal(2 * kHidden, 1, 6001);
  CpuJobs jobs;
  jobs.clear(model.kernel);
  std::atomic<bool> go = false;
  auto options = with_threads(2);
  options.on_begin = [&](int, uint32_t, int) {
    while (!go) std::this_thread::yield();
  };
  CpuExperts cpu(options);
  Values result(x.size(), 3.0f);
  cpu.start(jobs, x.data(), 2, result.data());
  CHECK(test::message_of<DeviceError>([&] { cpu.start(jobs, x.data(), 2, result.data()); }).find("busy") !=
        std::string::npos);
  go = true;
  cpu.wait();
  CHECK(result == Values(x.size(), 0.0f));
}

TEST_CASE("a batch whose worker dies ends with an error, and the next one works") {
  const Model model(SliceEncoding::int4, 1, 2, 8400);
  std::atomic<bool> deadly = true;
  auto options = with_threads(3);
  options.on_begin = [&](int worker, uint32_t, int) {
    if (deadly && worker == 2) throw std::runtime_error("no more");
  };
  CpuExperts cpu(options), other(with_threads(1));
  const auto x = normal(kHidden, 1, 8401);
  const CpuJobs jobs = model.jobs_of(0);
  const auto begin = Clock::now();
  CHECK(test::message_of<DeviceError>([&] { computed(cpu, jobs, x); }) ==
        "worker 2 of the CPU's experts failed: no more");
  CHECK(seconds_since(begin) < 1);
  deadly = false;
  CHECK(computed(cpu, jobs, x) == computed(other, jobs, x));
}

}  // namespace lighter::offload
