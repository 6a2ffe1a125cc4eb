// What the tests of the CPU's experts share: a small model, and how it is computed.
#pragma once

#include <chrono>
#include <memory>
#include <span>
#include <thread>
#include <vector>

#include "offload/cpu_experts.h"
#include "tests/runtime/random_slice.h"

namespace lighter::offload {

using Clock = std::chrono::steady_clock;
using Values = std::vector<float>;

inline constexpr int64_t kHidden = 640;
inline constexpr int64_t kWidth = 512;

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

  // The same for one token; of a negative expert: none.
  CpuJobs jobs_of(int expert, float in_weight = 1) const {
    CpuJobs jobs;
    jobs.clear(kernel);
    const TokenUse use{0, in_weight, 1};
    if (expert >= 0) add(jobs, expert, {&use, 1});
    return jobs;
  }

  CpuSliceKernel kernel;
  int slices_each;
  std::vector<std::unique_ptr<RandomSlice>> slices;
};

inline CpuExpertsOptions with_threads(int threads) {
  CpuExpertsOptions options;
  options.threads = threads;
  options.expert_width = 8 * kWidth;
  return options;
}

inline Values computed(CpuExperts& cpu, const CpuJobs& jobs, const Values& x) {
  Values result(x.size(), -7.0f);
  cpu.run(jobs, x.data(), static_cast<int64_t>(x.size()) / kHidden, result.data());
  return result;
}

// Before what polling workers read is written anew. (A GPU does not wait: what a worker then reads is of no
// use to it, and it knows.)
inline void await_idle(const CpuExperts& cpu) {
  while (!cpu.idle()) std::this_thread::yield();
}

inline double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace lighter::offload
