// The CPU's experts as a GPU's decode steps have them: polling a mailbox.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <thread>
#include <utility>

#include "runtime/error.h"
#include "tests/message_of.h"
#include "tests/offload/cpu_experts_rig.h"
#include "tests/offload/posted_x.h"

namespace lighter::offload {
namespace {

// What a GPU does: posts layers and waits for them.
class FakeGpu {
 public:
  explicit FakeGpu(const MissMailboxShape& shape)
      : memory_(MissMailbox::bytes(shape) + 128), mailbox_(aligned(memory_.data()), shape) {}

  const MissMailbox& mailbox() const { return mailbox_; }
  void post(int layer, uint32_t step, const Values& x, const std::vector<int>& experts, float weight) {
    const MissSlot slot = mailbox_.slot(layer);
    quantize_as_posted(x, mailbox_.shape().group, slot);
    std::copy(experts.begin(), experts.end(), slot.experts);
    std::fill_n(slot.weights, experts.size(), weight);
    std::fill_n(slot.factors, experts.size(), 1.0f);
    *slot.tokens = static_cast<int32_t>(x.size() / kHidden);
    std::atomic_ref(*slot.posted).store(step, std::memory_order_release);
  }
  // What the layer is expected to be posted.
  void guess(int layer, uint32_t step, const std::vector<int>& experts) {
    const MissSlot slot = mailbox_.slot(layer);
    std::copy(experts.begin(), experts.end(), slot.expected);
    std::atomic_ref(*slot.guessed).store(step, std::memory_order_release);
  }
  bool becomes(uint32_t* word, uint32_t step,
               std::chrono::milliseconds patience = std::chrono::seconds(20)) const {
    const auto deadline = Clock::now() + patience;
    while (std::atomic_ref(*word).load(std::memory_order_acquire) != step) {
      if (Clock::now() > deadline) return false;
      std::this_thread::yield();
    }
    return true;
  }
  bool done(int layer, uint32_t step, std::chrono::milliseconds patience = std::chrono::seconds(20)) const {
    return becomes(mailbox_.slot(layer).done, step, patience);
  }
  // Whether all values are the step's, or become so in time.
  bool whole(int layer, uint32_t step, std::chrono::milliseconds patience = std::chrono::seconds(20)) const {
    const MissSlot slot = mailbox_.slot(layer);
    const auto deadline = Clock::now() + patience;
    for (int64_t i = 0; i < mailbox_.shape().hidden;) {
      if (std::atomic_ref(slot.result[i]).load(std::memory_order_relaxed).step == step) {
        ++i;
      } else if (Clock::now() > deadline) {
        return false;
      } else {
        std::this_thread::yield();
      }
    }
    return true;
  }
  // Of a step that is done; values of another one are NaN.
  Values result(int layer, size_t count) const {
    const MissSlot slot = mailbox_.slot(layer);
    Values values;
    for (size_t i = 0; i < count; ++i) {
      values.push_back(slot.result[i].step == *slot.done ? slot.result[i].value : NAN);
    }
    return values;
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

// So that a check that fails leaves nobody waiting.
struct SetAtEnd {
  std::atomic<bool>& flag;
  ~SetAtEnd() { flag = true; }
};

}  // namespace

TEST_CASE("a posted layer is computed and published, step after step") {
  for (const auto encoding : kEncodings) {
    const Model model(encoding, 3, 2, 7000);
    const MissMailboxShape shape{4, 3, kHidden, 1, group_size(encoding)};
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
        await_idle(cpu);
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
    const MissMailboxShape shape{4, 1, kHidden, 1, group_size(encoding)};
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
        await_idle(cpu);
        if (told > 0) gpu.guess(layer, step, {expected});
        if (told > 1) std::this_thread::sleep_for(std::chrono::microseconds(random() % 60));
        await_idle(cpu);
        gpu.post(layer, step, x, {expert}, 0.75f);
        REQUIRE(gpu.done(layer, step));
        wrong += gpu.result(layer, x.size()) != computed(batch, model.jobs_of(expert, 0.75f), x);
        right += layer > 0 && told > 0 && expert >= 0 && expected == expert;
      }
    }
    CHECK(wrong == 0);
    cpu.stop_polling();
    CHECK(right > 0);
    CHECK(cpu.counters().layers_expected == right);
  }
}

TEST_CASE("layers that are posted before the ones before are done are computed, too") {
  // As by a GPU that has given up waiting for a worker without a core.
  const Model model(SliceEncoding::int4, 1, 2, 7450);
  const MissMailboxShape shape{6, 1, kHidden, 1, group_size(SliceEncoding::int4)};
  FakeGpu gpu(shape);
  auto options = with_threads(3);
  options.on_begin = [](int worker, uint32_t step, int layer) {
    if (step > 0 && worker == layer % 2) std::this_thread::sleep_for(std::chrono::milliseconds(3));
  };
  CpuExperts cpu(options), batch(with_threads(1));
  const CpuJobs jobs = model.jobs_of(0);
  cpu.start_polling(gpu.mailbox(), jobs_of(model), 1);
  int wrong = 0;
  for (uint32_t step = 1; step < 10; ++step) {
    std::vector<Values> x;
    for (int layer = 0; layer < shape.layers; ++layer) {
      x.push_back(normal(kHidden, 1, 7460 + step * 6 + layer));
      gpu.post(layer, step, x.back(), {0}, 1);
    }
    for (int layer = 0; layer < shape.layers; ++layer) REQUIRE(gpu.done(layer, step));
    await_idle(cpu);
    for (int layer = 0; layer < shape.layers; ++layer) {
      wrong += gpu.result(layer, kHidden) != computed(batch, jobs, x[layer]);
    }
  }
  CHECK(wrong == 0);
  cpu.stop_polling();
}

TEST_CASE("layers to which a worker does not come are done without it, and then it comes to the next one") {
  const Model model(SliceEncoding::int4, 2, 2, 7480);
  FakeGpu gpu({3, 1, kHidden, 1, group_size(SliceEncoding::int4)});
  auto options = with_threads(3);
  std::atomic<bool> held = false, go_on = false;
  std::atomic<int> came = 0;
  options.on_begin = [&](int worker, uint32_t step, int layer) {
    if (worker == 1) came = static_cast<int>(step) * 3 + layer;
    if (worker != 1 || step != 1 || layer != 0) return;
    held = true;
    while (!go_on) std::this_thread::yield();
  };
  CpuExperts cpu(options), batch(with_threads(1));
  const SetAtEnd at_end{go_on};
  cpu.start_polling(gpu.mailbox(), jobs_of(model), 1);
  int wrong = 0;
  const auto decode = [&](uint32_t step) {
    for (int layer = 0; layer < 3; ++layer) {
      const auto x = normal(kHidden, 1, 7481 + step * 3 + layer);
      await_idle(cpu);
      gpu.post(layer, step, x, {layer % 2}, 1);
      REQUIRE(gpu.done(layer, step));
      CHECK(gpu.becomes(gpu.mailbox().slot(layer).ending, step));
      wrong += gpu.result(layer, kHidden) != computed(batch, model.jobs_of(layer % 2), x);
    }
  };
  gpu.post(0, 1, normal(kHidden, 1, 7481 + 3), {0}, 1);
  while (!held) std::this_thread::yield();
  for (uint32_t step = 1; step < 9; ++step) decode(step);
  go_on = true;
  for (uint32_t step = 9; came < 3 * 9; ++step) decode(step);
  CHECK(wrong == 0);
  cpu.stop_polling();
  CHECK(cpu.counters().layers % 3 == 0);
}

TEST_CASE("what a worker has begun when it loses its core the others do, and no bit of the results changes") {
  for (const auto encoding : kEncodings) {
    const Model model(encoding, 2, 3, 7600);
    for (int stalled_piece = 1; stalled_piece < 8; ++stalled_piece) {
      CAPTURE(stalled_piece);
      const MissMailboxShape shape{60, 1, kHidden, 1, group_size(encoding)};  // each is posted once
      FakeGpu gpu(shape);
      auto options = with_threads(3);
      std::atomic<bool> stalled = false, go_on = false;
      std::atomic<int> pieces = 0;
      options.on_piece = [&](int) {
        if (++pieces != 11 * stalled_piece) return;  // of some worker, in another layer each time
        stalled = true;
        while (!go_on) std::this_thread::yield();
      };
      CpuExperts cpu(options), batch(with_threads(1));
      const SetAtEnd at_end{go_on};
      cpu.start_polling(gpu.mailbox(), jobs_of(model), 1);
      int wrong = 0, while_stalled = 0;
      for (int layer = 0; layer < shape.layers; ++layer) {
        const auto x = normal(kHidden, 1, 7610 + layer);
        const int expert = layer / 2 % 2;
        if (layer % 3 > 0) gpu.guess(layer, 1, {layer % 4 == 0 ? 1 - expert : expert});
        if (layer % 2 > 0) std::this_thread::sleep_for(std::chrono::microseconds(50));
        gpu.post(layer, 1, x, {expert}, 1);
        REQUIRE(gpu.done(layer, 1));
        wrong += gpu.result(layer, kHidden) != computed(batch, model.jobs_of(expert), x);
        while_stalled += stalled && !go_on;
        if (while_stalled == 20) go_on = true;
      }
      CHECK(wrong == 0);
      CHECK(while_stalled > 0);
      go_on = true;
      cpu.stop_polling();
    }
  }
}

// What late workers read is then being written: a data race of no effect.
#if !defined(__SANITIZE_THREAD__)
TEST_CASE("workers may lose their cores anywhere while a GPU goes on as soon as a result is whole") {
  for (const auto encoding : kEncodings) {
    const Model model(encoding, 3, 2, 7650);
    const MissMailboxShape shape{5, 1, kHidden, 1, group_size(encoding)};
    FakeGpu gpu(shape);
    auto options = with_threads(4);
    std::atomic<unsigned> turn = 0;
    const auto dawdle = [&] {
      const unsigned now = ++turn * 2654435761u >> 16;
      if (now % 61 == 0) std::this_thread::sleep_for(std::chrono::microseconds(now % 1500));
    };
    options.on_begin = [&](int, uint32_t, int) { dawdle(); };
    options.on_piece = [&](int) { dawdle(); };
    CpuExperts cpu(options), batch(with_threads(1));
    std::vector<Values> x, results[3];
    for (int i = 0; i < 3; ++i) {
      x.push_back(normal(kHidden, 1, 7660 + i));
      for (int expert = -1; expert < 3; ++expert) {
        results[i].push_back(computed(batch, model.jobs_of(expert, 0.5f), x[i]));
      }
    }
    std::mt19937 random(9);
    cpu.start_polling(gpu.mailbox(), jobs_of(model), 1);
    int wrong = 0;
    for (uint32_t step = 1; step < 400; ++step) {
      for (int layer = 0; layer < shape.layers; ++layer) {
        const int expert = static_cast<int>(random() % 4) - 1, input = static_cast<int>(random() % 3);
        if (random() % 3 > 0)
          gpu.guess(layer, step, {random() % 4 > 0 ? expert : static_cast<int>(random() % 3)});
        if (random() % 2 > 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 50));
        gpu.post(layer, step, x[input], {expert}, 0.5f);
        REQUIRE(gpu.whole(layer, step));
        for (int64_t i = 0; i < kHidden; ++i) {
          wrong += gpu.mailbox().slot(layer).result[i].value != results[input][expert + 1][i];
        }
      }
    }
    CHECK(wrong == 0);
    cpu.stop_polling();
  }
}
#endif

TEST_CASE("a worker that is away for too long while the others go on is an error, within a second") {
  const Model model(SliceEncoding::int8, 1, 2, 7700);
  FakeGpu gpu({2, 1, kHidden, 1, 128});
  auto options = with_threads(3);
  std::atomic<bool> go_on = false;
  options.on_begin = [&](int worker, uint32_t step, int) {
    while (worker == 2 && step == 2 && !go_on) std::this_thread::yield();
  };
  CpuExperts cpu(options);
  const SetAtEnd at_end{go_on};
  cpu.start_polling(gpu.mailbox(), jobs_of(model), 1);
  const auto x = normal(kHidden, 1, 7701);
  const auto begin = Clock::now();
  uint32_t step = 1;
  for (bool goes = true; goes && seconds_since(begin) < 10; ++step) {
    for (int layer = 0; layer < 2 && goes; ++layer) {
      await_idle(cpu);
      gpu.post(layer, step, x, {0}, 1);
      goes = gpu.done(layer, step, std::chrono::milliseconds(200));
    }
  }
  CHECK(seconds_since(begin) > 0.4);
  CHECK(seconds_since(begin) < 1);
  go_on = true;
  CHECK(test::message_of<DeviceError>([&] {
          cpu.stop_polling();
        }).find("worker 2 has not come for 400 ms; it has died or is starved of its core") !=
        std::string::npos);
}

TEST_CASE("polling goes on where it was told to after a batch and a pause") {
  const Model model(SliceEncoding::int8, 1, 1, 7500);
  FakeGpu gpu({2, 1, kHidden, 1, 128});
  CpuExperts cpu(with_threads(2));
  const auto x = normal(kHidden, 1, 7501);
  const CpuJobs jobs = model.jobs_of(0);
  const auto expected = computed(cpu, jobs, x);
  for (const uint32_t first : {1u, 4u, 0x7FFFFFFFu, 0xFFFFFFFFu}) {
    for (int layer = 0; layer < 2; ++layer) {  // of an earlier step: nobody must serve it
      std::atomic_ref(*gpu.mailbox().slot(layer).posted).store(first - 1, std::memory_order_release);
    }
    cpu.start_polling(gpu.mailbox(), jobs_of(model), first);
    CHECK_THROWS_AS(cpu.start(jobs, x.data(), 1, Values(kHidden).data()), DeviceError);
    for (const uint32_t step : {first, first + 1}) {
      for (int layer = 0; layer < 2; ++layer) {
        await_idle(cpu);
        gpu.post(layer, step, x, {0}, 1);
        REQUIRE(gpu.done(layer, step));
        CHECK(gpu.result(layer, kHidden) == expected);
      }
    }
    cpu.stop_polling();
    CHECK(computed(cpu, jobs, x) == expected);
  }
}

TEST_CASE("a worker that dies ends the others, and is heard of within a second") {
  const Model model(SliceEncoding::int8, 1, 2, 8000);
  FakeGpu gpu({2, 1, kHidden, 1, 128});
  std::atomic<bool> deadly = true, dead = false;
  auto options = with_threads(3);
  options.on_begin = [&](int worker, uint32_t step, int layer) {
    if (!deadly || worker != 1 || step != 2 || layer != 1) return;
    dead = true;
    throw std::runtime_error("pulled the plug");
  };
  CpuExperts cpu(options);
  const auto x = normal(kHidden, 1, 8001);
  cpu.start_polling(gpu.mailbox(), jobs_of(model), 1);
  for (const auto& [step, layer] : {std::pair{1u, 0}, {1u, 1}, {2u, 0}}) {
    gpu.post(layer, step, x, {0}, 1);
    REQUIRE(gpu.done(layer, step));
    await_idle(cpu);
  }
  gpu.post(1, 2, x, {0}, 1);
  while (!dead) std::this_thread::yield();
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  gpu.post(0, 3, x, {0}, 1);
  CHECK_FALSE(gpu.done(0, 3, std::chrono::milliseconds(100)));
  const auto begin = Clock::now();
  const auto message = test::message_of<DeviceError>([&] { cpu.stop_polling(); });
  CHECK(seconds_since(begin) < 1);
  CHECK(message == "worker 1 of the CPU's experts failed: at step 2, layer 1: pulled the plug");

  deadly = false;  // and one may start again
  cpu.start_polling(gpu.mailbox(), jobs_of(model), 4);
  gpu.post(0, 4, x, {0}, 1);
  CHECK(gpu.done(0, 4));
  cpu.stop_polling();
}

TEST_CASE("workers to whom the GPU, tired of waiting, has posted the next step end polling") {
  const Model model(SliceEncoding::int8, 3, 2, 8100);
  for (const int late_at : {0, 1}) {
    CAPTURE(late_at);
    FakeGpu gpu({2, 1, kHidden, 1, 128});
    auto options = with_threads(3);
    std::atomic<int> late = 0;
    std::atomic<bool> go_on = false;
    options.on_begin = [&](int, uint32_t step, int layer) {
      if (step != 1 || layer != late_at) return;
      ++late;
      while (!go_on) std::this_thread::yield();
    };
    CpuExperts cpu(options);
    const SetAtEnd at_end{go_on};
    cpu.start_polling(gpu.mailbox(), jobs_of(model), 1);
    const auto x = normal(kHidden, 1, 8101);
    for (int layer = 0; layer < 2; ++layer) gpu.post(layer, 1, x, {0}, 1);
    while (late < 3) std::this_thread::yield();
    for (int layer = 0; layer < 2; ++layer) gpu.post(layer, 2, x, {2}, 1);
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
  FakeGpu gpu({1, 1, kHidden, 1, 128});
  auto options = with_threads(2);
  std::atomic<bool> began = false, ended = false;
  options.on_begin = [&](int worker, uint32_t, int) {
    if (worker != 0) return;
    began = true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1500));
    ended = true;
  };
  {
    CpuExperts cpu(options);
    cpu.start_polling(gpu.mailbox(), jobs_of(model), 1);
    gpu.post(0, 1, normal(kHidden, 1, 8201), {0}, 1);
    while (!began) std::this_thread::yield();
    const auto begin = Clock::now();
    CHECK(test::message_of<DeviceError>([&] { cpu.stop_polling(); }).find("have not ended") !=
          std::string::npos);
    CHECK(seconds_since(begin) < 1.4);
  }
  CHECK(ended);
}

TEST_CASE("what the GPU or the caller's list gets wrong is an error that names the layer") {
  const Model model(SliceEncoding::int8, 1, 9, 8600);  // wider than promised
  FakeGpu gpu({1, 2, kHidden, 1, 128});
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
