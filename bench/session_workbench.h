// The workbench that measures for real: a cli::Session for each configuration, kept while only the workload
// changes, and the experts in host memory while the weights are the same. Not thread-safe; one in a process.
#pragma once

#include <atomic>
#include <memory>

#include "bench/kept_experts.h"
#include "bench/measure.h"
#include "bench/nvml.h"
#include "runtime/progress.h"

namespace lighter::bench {

class SessionWorkbench : public Workbench {
 public:
  // sweep must outlive it, and interrupted. progress: of loading. Throws ConfigError where the sweep's device is
  // not there.
  SessionWorkbench(const Sweep& sweep, const std::atomic<bool>& interrupted, Progress progress);
  ~SessionWorkbench() override;

  Load load(const Point& point) override;
  void unload() override;
  std::optional<uint64_t> in_use_bytes() override;
  MachineFacts machine() override;
  Rates measure_rates(const Rates& given) override;

 private:
  class Loaded;

  const Sweep& sweep_;
  const std::atomic<bool>& interrupted_;
  const Progress progress_;
  int cuda_index_ = -1;  // of the sweep's first point; -1: it runs on the CPU
  std::unique_ptr<Nvml> nvml_;
  KeptExperts experts_;
  std::unique_ptr<Loaded> loaded_;  // ends before what it shares
  double load_s_ = 0;
};

}  // namespace lighter::bench
