// Checks how a layer's parts come together with what the CPU makes, which arrives piece by piece. Needs a
// GPU.
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "runtime/kernels/decode.h"
#include "runtime/moe/miss_mailbox.h"
#include "tests/kernels/check_cuda.h"

using namespace lighter;
using namespace lighter::kernels;

namespace {

constexpr int kHidden = 5120;
constexpr int kPositions = 3;
constexpr int kLayer = 7;

int failures = 0;

void expect(bool condition, const char* what) {
  std::printf("%s: %s\n", condition ? "ok" : "FAILED", what);
  failures += !condition;
}

// Both see it, at the same address.
template <typename T>
T* shared(size_t count) {
  T* memory = nullptr;
  check(cudaHostAlloc(&memory, count * sizeof(T), cudaHostAllocMapped));
  for (size_t i = 0; i < count; ++i) memory[i] = T{};
  return memory;
}

struct Rig {
  Rig() {
    for (float& value : values_) value = normal_(engine_);
    for (int i = 0; i < kHidden; ++i) {
      residual[i] = normal_(engine_);
      fixed[i] = normal_(engine_);
      for (int p = 0; p < kPositions; ++p) partials[p * kHidden + i] = normal_(engine_);
    }
    computed[0] = computed[2] = 1;  // position 1 is the CPU's
    *positions = kPositions;
    before_.assign(residual, residual + kHidden);
  }

  // The kernel's, while cpu() runs.
  template <typename Cpu>
  double run(unsigned number, const Cpu& cpu) {
    *step = number;
    *error = 0;
    *signals = {};
    *times = {};
    std::copy(before_.begin(), before_.end(), residual);
    DecodeCombine c;
    c.hidden = kHidden;
    c.fixed_sum = fixed;
    c.partials = partials;
    c.computed = computed;
    c.positions = positions;
    c.from_cpu = results;
    c.cpu_ending = ending;
    c.signals = signals;
    c.step = step;
    c.error = error;
    c.layer = kLayer;
    c.residual = residual;
    c.times = times;
    const auto begin = std::chrono::steady_clock::now();
    decode_combine(c, nullptr);
    cpu();
    check(cudaDeviceSynchronize());
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
  void write(int begin, int end, unsigned number) {
    for (int i = begin; i < end; ++i) {
      unsigned bits;
      std::memcpy(&bits, &values_[i], 4);
      __atomic_store_n(reinterpret_cast<uint64_t*>(results + i), uint64_t{number} << 32 | bits,
                       __ATOMIC_RELAXED);
    }
  }
  void say_ending(unsigned number) { __atomic_store_n(ending, number, __ATOMIC_RELEASE); }
  bool right() const {
    for (int i = 0; i < kHidden; ++i) {
      const double wanted =
          double{before_[i]} + fixed[i] + partials[i] + partials[2 * kHidden + i] + values_[i];
      if (!(std::fabs(residual[i] - wanted) < 1e-5)) return false;
    }
    return true;
  }

  MissResult* const results = shared<MissResult>(kHidden);
  unsigned *const ending = shared<unsigned>(1), *const step = shared<unsigned>(1),
                  *const error = shared<unsigned>(1);
  LayerSignals* const signals = shared<LayerSignals>(1);
  LayerTimes* const times = shared<LayerTimes>(1);
  float *const residual = shared<float>(kHidden), *const fixed = shared<float>(kHidden),
               *const partials = shared<float>(kPositions * kHidden);
  unsigned char* const computed = shared<unsigned char>(kPositions);
  int* const positions = shared<int>(1);

 private:
  std::mt19937 engine_{std::random_device{}()};
  std::normal_distribution<float> normal_;
  std::vector<float> values_ = std::vector<float>(kHidden), before_;
};

void pause() {
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
}

}  // namespace

int main() {
  Rig rig;
  rig.write(0, kHidden, 5);
  rig.run(5, [&] { rig.say_ending(5); });
  expect(rig.right() && *rig.error == 0, "a result that is whole when its end is near");
  const auto first = rig.times->cpu;

  rig.write(0, kHidden, 5);  // as the step before has left them
  rig.run(6, [&] {
    pause();
    rig.write(0, 1000, 6);
    rig.say_ending(6);
    for (int i = 1000; i < kHidden; i += 1030) {
      pause();
      rig.write(i, std::min(i + 1030, kHidden), 6);
    }
  });
  expect(rig.right() && *rig.error == 0, "a result that comes piece by piece over an older one");
  expect(first > 0 && rig.times->cpu > first + 9'000'000, "when the last ones came is noted");

  const double never = rig.run(7, [] {});
  expect(*rig.error == 1 + kLayer, "what never comes is an error that names the layer");
  expect(never > 0.001 * kWaitLimitMs && never < 0.0011 * kWaitLimitMs + 0.1, "within its time");
  const double half = rig.run(8, [&] {
    rig.write(0, kHidden - 1, 8);
    rig.say_ending(8);
  });
  expect(*rig.error == 1 + kLayer, "and so is a value that never comes");
  expect(half > 0.001 * kWaitLimitMs && half < 0.0011 * kWaitLimitMs + 0.1, "within its time");
  return failures == 0 ? 0 : 1;
}
