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
// jobs, layer after layer, or skip() those that are over; whoever does not come any more must abandon().
//
// Others do not wait for a worker who has lost its core, unless it was just handing something over. If it was
// not at work, they take its part; if it was, those who find nothing else to do compute, after some patience,
// what it had begun as well. When it comes back it learns that the layer is over, and goes on with the one
// that the others are at.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "offload/cpu_jobs.h"
#include "offload/spin_barrier.h"
#include "offload/team_layers.h"
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
  // Away for so long, while the others have gone on, a worker is lost, or its core is somebody else's.
  static constexpr int kMostMissingMs = 400;

  // prefetch_bytes: how far ahead each worker asks for weights, beyond the rows that it reads side by side.
  // on_piece: called by each worker before it computes a piece that it has taken.
  CpuTeam(int workers, int64_t prefetch_bytes, std::function<void(int worker)> on_piece = {});
  ~CpuTeam();

  int workers() const { return workers_; }

  // Before a time of run() calls, while no worker is in one, by one thread: room for lists of up to so many
  // hidden values. Layers are counted anew.
  void reserve(int64_t hidden_values);
  // The same for one run() of these jobs. The workers then share the quantization of many rows.
  void reserve_for(const CpuJobs& jobs);

  // Before run(): the jobs that it will probably be given. Worker `index` may then ask for their weights, and
  // for some more with each further call.
  void expect(int index, const CpuJobs& jobs);
  void ask_ahead(int index);

  // Whether the others have completed the layer that worker `index` comes to next; if so, skip() it instead
  // of run(). Nothing of it may be looked up then.
  bool next_is_over(int index) const;
  void skip(int index);

  enum class Outcome {
    abandoned,  // by somebody
    late,       // the layer was over: nothing done
    left,       // while others may be at work
    completed,  // by this worker: the result is whole
  };
  // The share of worker `index`. expected: the jobs are what expect() was given, or would have been, which
  // must be so for all workers or none. What is given stays until the next call, or help() is called no more.
  Outcome run(int index, const CpuJobs& jobs, const TeamInput& x, int64_t tokens, const TeamOutput& result,
              bool expected = false);
  // Again and again while worker `index`, which has left the layer, waits for the next one: if others have
  // not ended what they had begun, it computes that, too. True: that completed the layer.
  bool help(int index);

  // Lets those go that wait for others. Any thread.
  void abandon() { abandoned_.store(true, std::memory_order_release); }
  bool abandoned() const { return abandoned_.load(std::memory_order_acquire); }

  // Of worker `index`'s last run(), by itself: how long it waited for others.
  int64_t waited_ns(int index) const;
  // By worker `index`, who has completed a layer: a worker who has not come for so long, while the others
  // went on, that it must be thought lost; or -1.
  int missing(int index) const;

 private:
  struct Worker;
  struct Work;

  void quantize_inputs(Worker& worker, const CpuJobs& jobs, const TeamInput& x);
  void begin_anew();
  void hold_next(Worker& worker);
  void compute_gate_up(Worker& worker, const Work& work, const WorkPiece& piece, PrefetchStream& ahead);
  bool compute_down(Worker& worker, const Work& work, const WorkPiece& piece, PrefetchStream& ahead);
  void compute_again(Worker& worker, bool down_too, int64_t since_ns);
  template <typename Ready>
  bool wait(Worker& worker, const Ready& ready, bool helps);
  static bool is_time_to_help(const Worker& worker, int64_t since_ns, int64_t& looked_ns);

  const int workers_;
  const int64_t prefetch_bytes_;
  const std::function<void(int worker)> on_piece_;
  std::vector<std::unique_ptr<Worker>> all_;
  TeamLayers layers_;
  SpinBarrier inputs_barrier_;  // behind shared inputs
  alignas(64) std::atomic<bool> abandoned_ = false;
  bool shares_inputs_ = false;  // then this holds the quantized ones
  QuantizedActivations shared_input_;
};

}  // namespace lighter::offload
