// The CPU executor: computes expert slices that are not on the GPU, from host memory, with workers that spin
// in a oneTBB arena of their own. Two ways in:
//
//   polling  decode: start_polling() → each worker waits for the layers that the GPU posts to a mailbox,
//            computes its share and goes on, without sleeping, until stop_polling(). One core each, all the
//            while. Where the GPU has told what it expects of a layer, they read ahead what they would
//            compute of that, as far as it stays in their caches, while they wait for the layer.
//   batches  any number of tokens: run(), or start() → wait() with the caller's thread free between them.
//
// One of the two at a time. What a worker throws ends the others, and is thrown by stop_polling() or wait()
// as a DeviceError that says where; after that one may start again. While it polls, a worker that has lost
// its core keeps nobody waiting (cpu_team.h), but one that does not come back ends the others, too. Calls
// come from one thread; counters() from any. The destructor waits for the workers; it does not throw.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "offload/cpu_jobs.h"
#include "runtime/moe/miss_mailbox.h"
#include "runtime/moe/miss_workers.h"

namespace lighter::offload {

struct CpuExpertsOptions {
  int threads = 0;  // 0: all cores but one
  int64_t expert_width =
      0;  // for polling: the most columns that a layer's jobs have for one choice of a token
  // How far ahead each worker asks for weights, beyond the rows that it reads side by side.
  int64_t prefetch_bytes = cpu_kernels::kPrefetchBytes;
  // Called by each worker when it has seen a layer posted, or begins its share of a batch (step and layer 0).
  // For tests, which throw or dawdle here.
  std::function<void(int worker, uint32_t step, int layer)> on_begin = {};
  // Likewise, before each piece of its share.
  std::function<void(int worker)> on_piece = {};
};

// Fills in the jobs of a posted layer (cleared with the layer's kernel, by it). Called by every worker for
// itself, so it must be cheap, thread-safe and give all the same.
using MakeCpuJobs = std::function<void(int layer, const MissPost& post, CpuJobs& jobs)>;

// Since construction, of polling: what was done, and the time from a post to `done`, as seen by the
// worker who completed the layer. bytes / busy_s is the rate at which the CPU reads weights.
struct CpuExpertsCounters {
  uint64_t layers = 0;           // that had jobs
  uint64_t layers_expected = 0;  // of these, those with the experts that the GPU had expected
  uint64_t bytes = 0;            // of weights
  double busy_s = 0;
  double waited_s = 0;  // of these, the mean worker's wait for others
};

class CpuExperts {
 public:
  static constexpr int kMostThreads = 192;

  // Throws ConfigError if there are not so many threads to be had.
  explicit CpuExperts(const CpuExpertsOptions& options);
  ~CpuExperts();

  int threads() const;

  // Returns when all workers are awake. Serves the steps from first_step on, none of which may be left out.
  // mailbox's memory and what make_jobs refers to stay until stop_polling() has returned.
  void start_polling(const MissMailbox& mailbox, MakeCpuJobs make_jobs, uint32_t first_step);
  // While polling: whether no worker looks up what was posted, or what make_jobs refers to. As long as
  // nothing is posted beyond a layer that is done, it stays so.
  bool idle() const;
  // Call when no layer is under way. Returns within about a second; throws what the workers met.
  void stop_polling();

  // result [tokens, hidden] fp32 = the jobs' sum for x [tokens, hidden] fp32; all stay until wait() has
  // returned. on_end: called by the last worker, also when one has failed, before wait() returns; must not
  // throw.
  void start(const CpuJobs& jobs, const float* x, int64_t tokens, float* result,
             std::function<void()> on_end = {});
  void wait();
  void run(const CpuJobs& jobs, const float* x, int64_t tokens, float* result);

  CpuExpertsCounters counters() const;
  // Of polling: the latest of each layer that had jobs. After stop_polling().
  std::vector<MissSpan> latest_spans() const;

 private:
  struct Polling;
  struct Parts;

  void launch(std::function<void(int worker)> work, std::function<void()> on_end = {});
  void await_workers();
  void rethrow();
  void fail(const std::string& what);
  void check_idle();
  void poll(int worker);
  bool wait_for_post(int worker, int layer, uint32_t step);
  bool serve(int worker, int layer, uint32_t step);
  bool was_expected(int layer, const MissPost& post) const;
  void end_layer(int worker);

  const CpuExpertsOptions options_;
  std::unique_ptr<Parts> parts_;
  std::unique_ptr<Polling> polling_;

  std::mutex mutex_;  // guards the next five
  std::condition_variable ended_;
  int running_ = 0;
  std::function<void()> on_end_;
  std::string failure_;
  std::vector<MissSpan> spans_;  // by layer
  std::atomic<int> awake_ = 0;
  alignas(64) std::atomic<bool> stopping_ = false;

  alignas(64) std::atomic<uint64_t> layers_ = 0;
  std::atomic<uint64_t> expected_layers_ = 0;
  std::atomic<uint64_t> bytes_ = 0;
  std::atomic<int64_t> busy_ns_ = 0;
  std::atomic<int64_t> waited_ns_ = 0;
};

}  // namespace lighter::offload
