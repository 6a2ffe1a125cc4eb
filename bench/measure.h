// What is measured of a point, and the machine that measures it, behind an interface, so that the runner is
// tested without a model. Absent optionals are figures that this machine does not give; they become null,
// never a guess.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "bench/sweep.h"
#include "runtime/moe/expert_counters.h"

namespace lighter::bench {

using offload::MissWay;
using offload::StepBytes;

// What a phase of a request took.
struct Spent {
  double wall_s = 0;
  double cpu_s = 0;  // of all threads of the process
  std::optional<double> gpu_busy_share;
  std::optional<double> gpu_energy_j;
  ExpertCounters experts;  // differences; all 0 for a dense model
};

// One request: `batch` prompts, then a step for each further token of every sequence.
struct RequestSample {
  Spent prefill;  // until every sequence has its first token
  Spent decode;
  std::vector<double> first_token_s;  // of each sequence, since the request began
  std::vector<double> step_s;         // of each decode step: the time between two tokens of a sequence
};

struct MemoryClass {
  std::string what;
  uint64_t device_bytes = 0;
  uint64_t host_bytes = 0;
};

// Known once a point is loaded.
struct PointFacts {
  std::string architecture;
  std::string device;
  std::string dtype;
  std::string experts;  // format of the routed experts; "" for a dense model
  std::string routing;  // "router", "uniform", "zipf:1", "trace …"; "" for a dense model
  std::string decode;   // "graph", or "eager: " and why
  std::string prompts;  // "random ids, seed 0", "heldout.txt"
  bool synthetic = false;
  int layers = 0;
  int threads = 0;
  int64_t context = 0;
  bool has_experts = false;
  double resident_share = 1;
  MissWay miss_way = MissWay::link;
  StepBytes step_bytes;
  uint64_t gpu_budget_bytes = 0;
  uint64_t host_budget_bytes = 0;
  std::vector<MemoryClass> memory;               // as planned
  std::optional<double> predicted_tokens_per_s;  // the planner's promise for decode
};

struct MemoryPeaks {
  uint64_t device_bytes = 0;                    // what was entered in the budget
  std::optional<uint64_t> device_driver_bytes;  // what the driver says
  uint64_t host_bytes = 0;                      // what was entered in the budget
  uint64_t process_bytes = 0;  // resident set of the whole program, its load and kept experts included
};

// A piece of work of one decode step, since the step's beginning.
struct TimelineEvent {
  std::string lane;  // "GPU", "CPU", "PCIe"
  std::string name;
  double begin_us = 0;
  double end_us = 0;
};
struct Timeline {
  std::string source;  // what recorded it
  std::vector<TimelineEvent> events;
  std::optional<std::string> note;  // why it is empty or lacks something
};

class LoadedPoint {
 public:
  virtual ~LoadedPoint() = default;
  virtual PointFacts facts(const Workload& workload) const = 0;
  // request: its number; each has prompts and routing of its own, the same for every point. Throws Interrupted
  // after Ctrl-C, ConfigError for a workload that the loaded model cannot take.
  virtual RequestSample run(const Workload& workload, int request) = 0;
  virtual MemoryPeaks memory() const = 0;
  // One more decode step after a run(), recorded and not timed.
  virtual Timeline record_step() = 0;
};

struct MachineFacts {
  std::string device;  // "cpu", "cuda:0"
  std::optional<std::string> gpu, driver;
  std::string cpu;
  int cores = 0;
  uint64_t host_memory_bytes = 0;
};

// Loads points. It may keep what the next point shares with the last one: the whole model when only the workload
// differs, the experts in host memory when the weights are the same. Not thread-safe.
class Workbench {
 public:
  struct Load {
    LoadedPoint* point = nullptr;  // until the next load() or unload()
    double load_s = 0;             // of the load that made it
    bool kept = false;             // made for an earlier point
    bool store_kept = false;       // the experts were in host memory already, from an earlier point
    // On the device with nothing loaded, just before this load; nothing if it was kept.
    std::optional<uint64_t> in_use_before_bytes;
  };

  virtual ~Workbench() = default;
  // Throws what loading throws; then nothing is loaded.
  virtual Load load(const Point& point) = 0;
  virtual void unload() = 0;
  // On the device, with nothing loaded. Experts that are kept in host memory do not count.
  virtual std::optional<uint64_t> in_use_bytes() = 0;
  virtual MachineFacts machine() = 0;
  // The ceilings that `given` leaves open, as far as they can be measured. With nothing loaded.
  virtual Rates measure_rates(const Rates& given) = 0;
};

}  // namespace lighter::bench
