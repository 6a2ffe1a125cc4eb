// The two phases of a layer's share for the CPU, spread over a fixed number of workers:
//
//   quantize x → gate and up rows of all jobs → down, ranges of output rows
//
// Within a phase the workers take pieces of the work as they come free (work_claims.h). Whoever computes the
// last of a job's hidden values quantizes them for all, and down waits for that job by job: where each worker
// read and quantized all of them behind a barrier, the 18 KB that 14 others had just written cost 15 workers
// 18 µs of a layer of 400. Many rows of x are quantized together too, with a barrier behind.
// result [tokens, hidden] = sum over jobs of out_weight * down(silu(gate(x * in_weight)) * up(x *
// in_weight)), in fp32, each value written once. A token's jobs are added in their order, so a result depends
// neither on the number of workers nor on who computed what. All workers call run() with lists of the same
// jobs, one after another; nobody begins one before all have left the one before. Whoever does not come must
// abandon().
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "offload/cpu_jobs.h"
#include "offload/spin_barrier.h"
#include "offload/work_claims.h"
#include "runtime/moe/miss_mailbox.h"

namespace lighter::offload {

// [tokens, hidden], in fp32 or as a mailbox has it.
struct TeamInput {
  const float* x = nullptr;
  const int8_t* quantized = nullptr;
  const float* scales = nullptr;  // of quantized: [tokens, groups]
};

// [tokens, hidden] in fp32, or to a layer of a mailbox, which is told that the end is near when a worker
// finds nothing left to begin.
struct TeamOutput {
  float* sums = nullptr;
  const MissMailbox* mailbox = nullptr;
  int layer = 0;
  uint32_t step = 0;
};

class CpuTeam {
 public:
  // prefetch_bytes: how far ahead each worker asks for weights, beyond the rows that it reads side by side.
  CpuTeam(int workers, int64_t prefetch_bytes);
  ~CpuTeam();

  int workers() const { return workers_; }

  // Before a time of run() calls, by one thread: room for lists of up to so many hidden values.
  void reserve(int64_t hidden_values);
  // The same for one run() of these jobs. The workers then share the quantization of many rows.
  void reserve_for(const CpuJobs& jobs);

  // Before run(): the jobs that it will probably be given. Worker `index` may then ask for their weights, and
  // for some more with each further call.
  void expect(int index, const CpuJobs& jobs);
  void ask_ahead(int index);

  enum class Outcome {
    abandoned,  // by somebody
    left,       // while others may be at work
    left_last,  // the result is whole
  };
  // The share of worker `index`. expected: the jobs are what expect() was given, or would have been, which
  // must be so for all workers or none.
  Outcome run(int index, const CpuJobs& jobs, const TeamInput& x, int64_t tokens, const TeamOutput& result,
              bool expected = false);

  // Lets those go that wait for others. Any thread.
  void abandon() { abandoned_.store(true, std::memory_order_release); }
  bool abandoned() const { return abandoned_.load(std::memory_order_acquire); }

  // Of worker `index`'s last run(): how long it waited for others.
  int64_t waited_ns(int index) const;

 private:
  struct Worker;

  // The hidden values of a job, [uses, columns].
  struct alignas(64) Hidden {
    std::atomic<int64_t> computed = 0;  // columns
    std::atomic<uint64_t> layer = 0;    // whose they are, once quantized
    QuantizedActivations quantized;
  };

  // Of a layer. There are two: a fast worker may ask for what is expected of the next layer while others are
  // at this one.
  struct Layer {
    struct Claims {
      WorkClaims gate_up;
      WorkClaims down;
    };
    std::vector<float> values;  // hidden, of all jobs
    std::deque<Hidden> hidden;  // by job
    Hidden& hidden_of(const CpuJobs& jobs, const CpuJobs::Job& job) {
      return hidden[static_cast<size_t>(&job - jobs.jobs().data())];
    }
    Claims known;
    Claims expected;

    void reset() {
      for (Claims* claims : {&known, &expected}) {
        claims->gate_up.reset();
        claims->down.reset();
      }
    }
  };

  void quantize_inputs(Worker& worker, const CpuJobs& jobs, const TeamInput& x);
  void compute_gate_up(Worker& worker, const CpuJobs& jobs, WorkPiece piece, Layer& layer);
  bool compute_down(Worker& worker, const CpuJobs& jobs, WorkPiece piece, int64_t tokens,
                    const TeamOutput& result, Layer& layer);
  template <typename Ready>
  bool wait(Worker& worker, const Ready& ready);

  const int workers_;
  const int64_t prefetch_bytes_;
  std::vector<std::unique_ptr<Worker>> all_;
  SpinBarrier inputs_barrier_;  // behind shared inputs
  SpinBarrier layer_barrier_;   // rounds are layers: waited for at the next one's beginning
  alignas(64) std::atomic<bool> abandoned_ = false;
  Layer layers_[2];
  bool shares_inputs_ = false;  // then this holds the quantized ones
  QuantizedActivations shared_input_;
};

}  // namespace lighter::offload
