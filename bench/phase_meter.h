// Measures what a phase takes beside time: CPU time of the process, GPU energy, how busy the GPU was. Not
// thread-safe; between begin() and end() a thread of its own asks the GPU every 100 ms.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "bench/measure.h"
#include "bench/nvml.h"

namespace lighter::bench {

// User and system time of the process, all threads.
double process_cpu_s();

class PhaseMeter {
 public:
  // nvml may be null and must outlive it.
  explicit PhaseMeter(const Nvml* nvml) : nvml_(nvml) {}
  ~PhaseMeter() { stop_sampling(); }
  PhaseMeter(const PhaseMeter&) = delete;
  PhaseMeter& operator=(const PhaseMeter&) = delete;

  // experts: the counters now.
  void begin(const ExpertCounters& experts);
  Spent end(const ExpertCounters& experts);

 private:
  using Clock = std::chrono::steady_clock;
  void sample();
  void stop_sampling();

  const Nvml* nvml_;
  Clock::time_point begin_;
  double cpu_s_ = 0;
  std::optional<double> energy_j_;
  ExpertCounters experts_;
  std::vector<double> busy_;
  std::mutex mutex_;
  std::condition_variable ended_;
  bool sampling_ = false;  // guarded
  std::thread thread_;
};

}  // namespace lighter::bench
