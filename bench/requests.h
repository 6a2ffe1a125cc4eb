// Runs requests on a model and takes the time of every token. Greedy. Not thread-safe.
#pragma once

#include <atomic>
#include <functional>
#include <vector>

#include "bench/measure.h"
#include "bench/phase_meter.h"
#include "runtime/engine/model.h"

namespace lighter::bench {

class Requests {
 public:
  // counters: the executor's, now. nvml may be null. All must outlive it.
  Requests(Model& model, int64_t prefill_chunk, std::function<ExpertCounters()> counters, const Nvml* nvml,
           const std::atomic<bool>& interrupted)
      : model_(model),
        prefill_chunk_(prefill_chunk),
        counters_(std::move(counters)),
        meter_(nvml),
        interrupted_(interrupted) {}

  // prompts: one for each sequence, of the same length. Throws Interrupted.
  RequestSample run(const std::vector<std::vector<int64_t>>& prompts, int64_t generated_tokens);
  // After run(): one more step, as the next of its decode; false if the context has no room for it.
  bool one_more_step();

 private:
  // The next sequence, or as many as fit into one step.
  void prefill(const std::vector<std::vector<int64_t>>& prompts);
  void decode_step(bool goes_on);
  void check_interrupted() const;

  Model& model_;
  const int64_t prefill_chunk_;
  const std::function<ExpertCounters()> counters_;
  PhaseMeter meter_;
  const std::atomic<bool>& interrupted_;
  std::vector<int64_t> last_;  // of each sequence: its newest token
  int64_t position_ = 0;       // of that token
};

}  // namespace lighter::bench
