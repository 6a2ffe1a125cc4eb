#include "offload/cpu_experts.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>

#include "offload/work_claims.h"
#include "runtime/error.h"
#include "runtime/quant/slice_reference.h"
#include "tests/message_of.h"
#include "tests/runtime/random_slice.h"

namespace lighter::offload {
namespace {

namespace reference = slice_reference;
using Clock = std::chrono::steady_clock;
using Values = std::vector<float>;

constexpr int64_t kHidden = 640;
constexpr int64_t kWidth = 512;

// Some experts of some slices each.
struct Model {
  Model(SliceEncoding encoding, int experts, int slices_each, unsigned seed)
      : kernel(encoding, kHidden, kWidth), slices_each(slices_each) {
    for (int i = 0; i < experts * slices_each; ++i) {
      slices.push_back(std::make_unique<RandomSlice>(encoding, kHidden, kWidth, seed + 10 * i));
    }
  }
  const std::byte* slice(int expert, int part) const {
    return slices[expert * slices_each + part]->bytes.data();
  }
  // All slices of an expert for the tokens that chose it.
  void add(CpuJobs& jobs, int expert, std::span<const TokenUse> uses) const {
    const int id = jobs.add_expert(uses);
    for (int part = 0; part < slices_each; ++part) jobs.add_job(id, slice(expert, part), {0, kWidth});
  }

  CpuSliceKernel kernel;
  int slices_each;
  std::vector<std::unique_ptr<RandomSlice>> slices;
};

CpuExpertsOptions with_threads(int threads) {
  CpuExpertsOptions options;
  options.threads = threads;
  options.expert_width = 8 * kWidth;
  return options;
}

Values computed(CpuExperts& cpu, const CpuJobs& jobs, const Values& x) {
  Values result(x.size(), -7.0f);
  cpu.run(jobs, x.data(), static_cast<int64_t>(x.size()) / kHidden, result.data());
  return result;
}

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

// What a GPU does: posts layers and waits for them.
class FakeGpu {
 public:
  explicit FakeGpu(const MissMailboxShape& shape)
      : memory_(MissMailbox::bytes(shape) + 128), mailbox_(aligned(memory_.data()), shape) {}

  const MissMailbox& mailbox() const { return mailbox_; }
  void post(int layer, uint32_t step, const Values& x, const std::vector<int>& experts, float weight) {
    const MissSlot slot = mailbox_.slot(layer);
    std::copy(x.begin(), x.end(), slot.x);
    std::copy(experts.begin(), experts.end(), slot.experts);
    std::fill_n(slot.weights, experts.size(), weight);
    std::fill_n(slot.scales, experts.size(), 1.0f);
    *slot.tokens = static_cast<int32_t>(x.size() / kHidden);
    std::atomic_ref(*slot.posted).store(step, std::memory_order_release);
  }
  // What the layer is expected to be posted.
  void guess(int layer, uint32_t step, const std::vector<int>& experts) {
    const MissSlot slot = mailbox_.slot(layer);
    std::copy(experts.begin(), experts.end(), slot.expected);
    std::atomic_ref(*slot.guessed).store(step, std::memory_order_release);
  }
  bool done(int layer, uint32_t step, std::chrono::milliseconds patience = std::chrono::seconds(20)) const {
    const auto deadline = Clock::now() + patience;
    while (std::atomic_ref(*mailbox_.slot(layer).done).load(std::memory_order_acquire) != step) {
      if (Clock::now() > deadline) return false;
      std::this_thread::yield();
    }
    return true;
  }
  Values result(int layer, size_t count) const {
    const float* from = mailbox_.slot(layer).result;
    return {from, from + count};
  }

 private:
  static std::byte* aligned(std::byte* from) {
    return from + (128 - reinterpret_cast<uintptr_t>(from) % 128);
  }

  std::vector<std::byte> memory_;
  MissMailbox mailbox_;
};

// One expert for each token, scaled on its way in.
MakeCpuJobs jobs_of(const Model& model) {
  return [&model](int, const MissPost& post, CpuJobs& jobs) {
    jobs.clear(model.kernel);
    for (int32_t token = 0; token < post.tokens; ++token) {
      if (post.experts[token] < 0) continue;
      const TokenUse use{token, post.is_expected() ? 1 : post.weights[token], 1};
      model.add(jobs, post.experts[token], {&use, 1});
    }
  };
}

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
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
        claims.reset();
        CHECK(claims.take(pieces, none) == (total > 0));
      }
    }
  }
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
    CpuJobs jobs;
    jobs.clear(model.kernel);
    const TokenUse use;
    model.add(jobs, 0, {&use, 1});
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

TEST_CASE("a posted layer is computed and published, step after step") {
  for (const auto encoding : kEncodings) {
    const Model model(encoding, 3, 2, 7000);
    const MissMailboxShape shape{4, 3, kHidden, 1};
    FakeGpu gpu(shape);
    CpuExperts cpu(with_threads(3)), batch(with_threads(1));
    std::mt19937 random(7);
    cpu.start_polling(gpu.mailbox(), jobs_of(model), 5);
    uint64_t bytes = 0, layers = 0;
    int wrong = 0;
    for (uint32_t step = 5; step < 45; ++step) {
      for (int layer = 0; layer < shape.layers; ++layer) {
        const int tokens = 1 + static_cast<int>(random() % 3);
        const auto x = normal(tokens * kHidden, 1, 7100 + step * 4 + layer);
        std::vector<int> experts;
        CpuJobs jobs;
        jobs.clear(model.kernel);
        for (int token = 0; token < tokens; ++token) {
          experts.push_back(static_cast<int>(random() % 4) - 1);  // -1: nothing missing
          const TokenUse use{token, 0.75f, 1};
          if (experts.back() >= 0) model.add(jobs, experts.back(), {&use, 1});
        }
        gpu.post(layer, step, x, experts, 0.75f);
        REQUIRE(gpu.done(layer, step));
        wrong += gpu.result(layer, x.size()) != computed(batch, jobs, x);
        bytes += jobs.weight_bytes();
        layers += !jobs.jobs().empty();
      }
    }
    CHECK(wrong == 0);
    cpu.stop_polling();
    cpu.stop_polling();  // nothing to do
    CHECK(cpu.counters().bytes == bytes);
    CHECK(cpu.counters().layers == layers);
    CHECK(cpu.counters().busy_s > 0);
    CHECK(cpu.counters().waited_s < cpu.counters().busy_s);
  }
}

TEST_CASE(
    "what was expected of a layer, rightly or wrongly, in time or not, does not change what is computed") {
  for (const auto encoding : kEncodings) {
    const Model model(encoding, 3, 2, 7300);
    const MissMailboxShape shape{4, 1, kHidden, 1};
    FakeGpu gpu(shape);
    CpuExperts cpu(with_threads(3)), batch(with_threads(1));
    std::mt19937 random(8);
    cpu.start_polling(gpu.mailbox(), jobs_of(model), 1);
    uint64_t right = 0;
    int wrong = 0;
    for (uint32_t step = 1; step < 120; ++step) {
      for (int layer = 0; layer < shape.layers; ++layer) {
        const auto x = normal(kHidden, 1, 7400 + step * 4 + layer);
        const int expert = static_cast<int>(random() % 4) - 1;  // -1: nothing missing
        const int expected = random() % 2 == 0 ? expert : static_cast<int>(random() % 4) - 1;
        const int told = static_cast<int>(random() % 4);  // 0: not at all; 1: at once; else: some time before
        if (told > 0) gpu.guess(layer, step, {expected});
        if (told > 1) std::this_thread::sleep_for(std::chrono::microseconds(random() % 60));
        gpu.post(layer, step, x, {expert}, 0.75f);
        REQUIRE(gpu.done(layer, step));
        CpuJobs jobs;
        jobs.clear(model.kernel);
        const TokenUse use{0, 0.75f, 1};
        if (expert >= 0) model.add(jobs, expert, {&use, 1});
        wrong += gpu.result(layer, x.size()) != computed(batch, jobs, x);
        right += layer > 0 && told > 0 && expert >= 0 && expected == expert;
      }
    }
    CHECK(wrong == 0);
    cpu.stop_polling();
    CHECK(right > 0);
    CHECK(cpu.counters().layers_expected == right);
  }
}

TEST_CASE("layers that are posted before the ones before are done are computed one after the other") {
  // As by a GPU that has given up waiting for a worker without a core.
  const Model model(SliceEncoding::int4, 1, 2, 7450);
  const MissMailboxShape shape{6, 1, kHidden, 1};
  FakeGpu gpu(shape);
  auto options = with_threads(3);
  options.on_begin = [](int worker, uint32_t step, int layer) {
    if (step > 0 && worker == layer % 2) std::this_thread::sleep_for(std::chrono::milliseconds(3));
  };
  CpuExperts cpu(options), batch(with_threads(1));
  CpuJobs jobs;
  jobs.clear(model.kernel);
  const TokenUse use;
  model.add(jobs, 0, {&use, 1});
  cpu.start_polling(gpu.mailbox(), jobs_of(model), 1);
  int wrong = 0;
  for (uint32_t step = 1; step < 10; ++step) {
    std::vector<Values> x;
    for (int layer = 0; layer < shape.layers; ++layer) {
      x.push_back(normal(kHidden, 1, 7460 + step * 6 + layer));
      gpu.post(layer, step, x.back(), {0}, 1);
    }
    REQUIRE(gpu.done(shape.layers - 1, step));
    for (int layer = 0; layer < shape.layers; ++layer) {
      wrong += gpu.result(layer, kHidden) != computed(batch, jobs, x[layer]);
    }
  }
  CHECK(wrong == 0);
  cpu.stop_polling();
}

TEST_CASE("polling goes on where it was told to after a batch and a pause") {
  const Model model(SliceEncoding::int8, 1, 1, 7500);
  FakeGpu gpu({2, 1, kHidden, 1});
  CpuExperts cpu(with_threads(2));
  const auto x = normal(kHidden, 1, 7501);
  CpuJobs jobs;
  jobs.clear(model.kernel);
  const TokenUse use;
  model.add(jobs, 0, {&use, 1});
  const auto expected = computed(cpu, jobs, x);
  for (const uint32_t first : {1u, 4u, 0xFFFFFFFFu}) {
    for (int layer = 0; layer < 2; ++layer) {  // of an earlier step: nobody must serve it
      std::atomic_ref(*gpu.mailbox().slot(layer).posted).store(first - 1, std::memory_order_release);
    }
    cpu.start_polling(gpu.mailbox(), jobs_of(model), first);
    CHECK_THROWS_AS(cpu.start(jobs, x.data(), 1, Values(kHidden).data()), DeviceError);
    for (const uint32_t step : {first, first + 1}) {
      for (int layer = 0; layer < 2; ++layer) {
        gpu.post(layer, step, x, {0}, 1);
        REQUIRE(gpu.done(layer, step));
        CHECK(gpu.result(layer, kHidden) == expected);
      }
    }
    cpu.stop_polling();
    CHECK(computed(cpu, jobs, x) == expected);
  }
}

TEST_CASE(
    "a worker that dies leaves its layer unpublished, ends the others, and is heard of within a second") {
  const Model model(SliceEncoding::int8, 1, 2, 8000);
  FakeGpu gpu({2, 1, kHidden, 1});
  std::atomic<bool> deadly = true;
  auto options = with_threads(3);
  options.on_begin = [&](int worker, uint32_t step, int layer) {
    if (deadly && worker == 1 && step == 2 && layer == 1) throw std::runtime_error("pulled the plug");
  };
  CpuExperts cpu(options);
  const auto x = normal(kHidden, 1, 8001);
  cpu.start_polling(gpu.mailbox(), jobs_of(model), 1);
  for (const auto& [step, layer] : {std::pair{1u, 0}, {1u, 1}, {2u, 0}}) {
    gpu.post(layer, step, x, {0}, 1);
    REQUIRE(gpu.done(layer, step));
  }
  gpu.post(1, 2, x, {0}, 1);
  CHECK_FALSE(gpu.done(1, 2, std::chrono::milliseconds(100)));
  const auto begin = Clock::now();
  const auto message = test::message_of<DeviceError>([&] { cpu.stop_polling(); });
  CHECK(seconds_since(begin) < 1);
  CHECK(message == "worker 1 of the CPU's experts failed: at step 2, layer 1: pulled the plug");

  deadly = false;  // and one may start again
  cpu.start_polling(gpu.mailbox(), jobs_of(model), 3);
  gpu.post(0, 3, x, {0}, 1);
  CHECK(gpu.done(0, 3));
  cpu.stop_polling();
}

TEST_CASE(
    "a worker to whom the GPU, tired of waiting, has posted the next step ends polling, and all others") {
  const Model model(SliceEncoding::int8, 3, 2, 8100);
  for (const int late_at : {0, 1}) {
    CAPTURE(late_at);
    FakeGpu gpu({2, 1, kHidden, 1});
    auto options = with_threads(3);
    std::atomic<bool> late = false, go_on = false;
    options.on_begin = [&](int worker, uint32_t step, int layer) {
      if (worker != 1 || step != 1 || layer != late_at) return;
      late = true;
      while (!go_on) std::this_thread::yield();
    };
    CpuExperts cpu(options);
    // In the next step there is twice as much to do.
    const auto make_jobs = [&](int, const MissPost& post, CpuJobs& jobs) {
      const int expert = std::atomic_ref(const_cast<int32_t&>(*post.experts)).load();
      jobs.clear(model.kernel);
      const TokenUse use;
      model.add(jobs, expert, {&use, 1});
      if (expert > 0) model.add(jobs, 0, {&use, 1});
    };
    cpu.start_polling(gpu.mailbox(), make_jobs, 1);
    const auto x = normal(kHidden, 1, 8101);
    for (int layer = 0; layer < 2; ++layer) gpu.post(layer, 1, x, {0}, 1);
    while (!late) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::milliseconds(50));  // the others are at work
    for (int layer = 0; layer < 2; ++layer) {
      const MissSlot slot = gpu.mailbox().slot(layer);
      std::atomic_ref(*slot.experts).store(2);
      std::atomic_ref(*slot.posted).store(2, std::memory_order_release);
    }
    go_on = true;
    CHECK_FALSE(gpu.done(late_at, 1, std::chrono::milliseconds(100)));
    const auto begin = Clock::now();
    const auto message = test::message_of<DeviceError>([&] { cpu.stop_polling(); });
    CHECK(seconds_since(begin) < 1);
    CHECK(message.find("at step 1, layer " + std::to_string(late_at) + ": the GPU has gone on to step 2") !=
          std::string::npos);
  }
}

TEST_CASE("a worker that dawdles is reported within about a second, and the destructor waits for it") {
  const Model model(SliceEncoding::int8, 1, 1, 8200);
  FakeGpu gpu({1, 1, kHidden, 1});
  auto options = with_threads(2);
  std::atomic<bool> ended = false;
  options.on_begin = [&](int worker, uint32_t, int) {
    if (worker != 0) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(1500));
    ended = true;
  };
  {
    CpuExperts cpu(options);
    cpu.start_polling(gpu.mailbox(), jobs_of(model), 1);
    gpu.post(0, 1, normal(kHidden, 1, 8201), {0}, 1);
    const auto begin = Clock::now();
    CHECK(test::message_of<DeviceError>([&] { cpu.stop_polling(); }).find("have not ended") !=
          std::string::npos);
    CHECK(seconds_since(begin) < 1.4);
  }
  CHECK(ended);
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
  CpuJobs jobs;
  jobs.clear(model.kernel);
  const TokenUse use;
  model.add(jobs, 0, {&use, 1});
  const auto begin = Clock::now();
  CHECK(test::message_of<DeviceError>([&] { computed(cpu, jobs, x); }) ==
        "worker 2 of the CPU's experts failed: no more");
  CHECK(seconds_since(begin) < 1);
  deadly = false;
  CHECK(computed(cpu, jobs, x) == computed(other, jobs, x));
}

TEST_CASE("what the GPU or the caller's list gets wrong is an error that names the layer") {
  const Model model(SliceEncoding::int8, 1, 9, 8600);  // wider than promised
  FakeGpu gpu({1, 2, kHidden, 1});
  CpuExperts cpu(with_threads(2));
  cpu.start_polling(gpu.mailbox(), jobs_of(model), 1);
  gpu.post(0, 1, normal(2 * kHidden, 1, 8601), {0, 0}, 1);
  CHECK_FALSE(gpu.done(0, 1, std::chrono::milliseconds(50)));
  auto message = test::message_of<DeviceError>([&] { cpu.stop_polling(); });
  CHECK(message.find("step 1, layer 0") != std::string::npos);
  CHECK(message.find("9216 hidden values, and there is room for 8192") != std::string::npos);

  cpu.start_polling(gpu.mailbox(), jobs_of(model), 2);
  *gpu.mailbox().slot(0).tokens = 77;
  std::atomic_ref(*gpu.mailbox().slot(0).posted).store(2, std::memory_order_release);
  CHECK_FALSE(gpu.done(0, 2, std::chrono::milliseconds(50)));
  message = test::message_of<DeviceError>([&] { cpu.stop_polling(); });
  CHECK(message.find("the GPU posted 77 tokens to a mailbox for 2") != std::string::npos);
}

}  // namespace lighter::offload
