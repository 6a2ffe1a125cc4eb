// The two phases of a layer's share for the CPU, spread over a fixed number of workers:
//
//   quantize x → gate and up rows of all jobs → [barrier] → quantize hidden → down, a range of output rows
//   each
//
// result [tokens, hidden] fp32 = sum over jobs of out_weight * down(silu(gate(x * in_weight)) * up(x *
// in_weight)). A token's jobs are added in their order, so a result does not depend on the number of workers.
// All workers call run() with lists of the same jobs, one after another; whoever does not come must
// abandon().
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "offload/cpu_jobs.h"
#include "offload/spin_barrier.h"

namespace lighter::offload {

class CpuTeam {
 public:
  explicit CpuTeam(int workers);
  ~CpuTeam();

  int workers() const { return workers_; }

  // Before a time of run() calls, by one thread: room for lists of up to so many hidden values.
  void reserve(int64_t hidden_values);
  // The same for one run() of these jobs. The workers then share the quantization of many inputs.
  void reserve_for(const CpuJobs& jobs);

  // The share of worker `index`. x, result: [tokens, hidden]. False: somebody has abandoned the team. When
  // all have returned true, result is whole.
  bool run(int index, const CpuJobs& jobs, const float* x, int64_t tokens, float* result);

  // Lets those go that wait for others. Any thread.
  void abandon() { abandoned_.store(true, std::memory_order_release); }
  bool abandoned() const { return abandoned_.load(std::memory_order_acquire); }

  // Of worker `index`'s last run(): how long it waited for others between the phases.
  int64_t waited_ns(int index) const;

 private:
  struct Worker;

  void quantize_inputs(Worker& worker, int index, const CpuJobs& jobs, const float* x);
  bool pass_barrier(Worker& worker);

  const int workers_;
  std::vector<std::unique_ptr<Worker>> all_;
  SpinBarrier barrier_;
  alignas(64) std::atomic<bool> abandoned_ = false;
  // Hidden values of two layers: a fast worker may begin the next while others read this one's.
  std::vector<float> values_[2];
  QuantizedActivations shared_input_;
  bool shares_input_ = false;
};

}  // namespace lighter::offload
