// Brings the slices that a decode step misses while the step runs: a thread polls the mailbox, copies a
// posted layer's missed slices to the graph's slots, in the order of their sum, and after each the word that
// tells the kernels. They compute a slice while the next one comes, and nothing waits for the host but the
// slices themselves.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include "runtime/device/device.h"
#include "runtime/moe/expert_id.h"
#include "runtime/moe/miss_workers.h"

namespace lighter::offload {

class MissFetcher : public MissWorkers {
 public:
  // The device must outlive it.
  MissFetcher(Device& device, const ExpertGrid& grid, int experts_per_token);
  ~MissFetcher() override;

  void start(const MissWork& work, uint32_t first_step) override;
  void stop() override;
  bool idle() const override { return true; }  // it tells of a layer when it looks nothing up for it any more
  // The CPU computes nothing.
  MissWorkersCounters counters() const override { return {}; }
  std::vector<MissSpan> latest_spans() const override { return {}; }

 private:
  void serve(const MissWork& work, uint32_t step);
  void copy_missed(const MissWork& work, int layer, const MissPost& post);

  const ExpertGrid grid_;
  // Words go their own way, so that the slices follow one another without a gap.
  const std::unique_ptr<Stream> slices_, words_;
  std::vector<std::unique_ptr<Event>> copied_;  // by slot
  std::thread thread_;
  std::atomic<bool> stopping_ = false;
  std::exception_ptr failure_;  // the thread's, until it is joined
};

}  // namespace lighter::offload
