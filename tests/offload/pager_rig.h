// A SlicePager on the CPU device together with everything that can be known about it from outside: the bytes
// of every visited slice, the order of the visits, and what the counters must say.
#pragma once

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "offload/slice_pager.h"
#include "tests/offload/pattern_source.h"

namespace lighter::offload {

struct LayerVisit {
  std::vector<int> experts;  // ascending
  bool streaming = false;
  std::vector<std::pair<int, std::vector<int>>> hints;  // layer, experts
  int pause_us = 0;  // of the work that overlaps: it lets prefetches come in time
};

// What one step asks, by layer.
using StepVisits = std::vector<LayerVisit>;

// How steps are drawn.
struct Traffic {
  double streaming = 0;  // share of the steps that take nearly every expert, layer by layer
  double hints = 0;      // share of the layers that guess
  double good_guess = 0.7;
  int depth = 2;         // layers ahead
  int most_experts = 4;  // of a layer that does not stream
  double pauses = 0.1;   // share of the layers that guess and then take their time
};

StepVisits draw_step(const ExpertGrid& grid, const Traffic& traffic, std::mt19937& random);

// A CPU device whose compute stream is a thread, so that the host runs ahead of it as it does on a GPU.
std::unique_ptr<Device> make_lagging_device(uint64_t device_budget_bytes, uint64_t host_budget_bytes);

// The bytes that a pager of these options may take, from the options alone.
uint64_t device_bytes_for(const ExpertGrid& grid, const PagerOptions& options);

class PagerRig {
 public:
  // Budgets are exactly what the options need. lagging: see make_lagging_device.
  PagerRig(const ExpertGrid& grid, const PagerOptions& options, bool lagging = false);

  // Visits every layer and checks all it can; the first thing wrong stays in failure().
  void run(const StepVisits& step);
  const std::string& failure() const { return failure_; }

  SlicePager& pager() { return *pager_; }
  Device& device() { return *device_; }
  const PatternSource& source() const { return source_; }

 private:
  void expect(bool right, const char* what);
  void visit(int layer, const LayerVisit& visit);
  void check_layers_to_come(int layer);
  void check_counters(const StepVisits& step, const ExpertCounters& before);

  const ExpertGrid grid_;
  const PagerOptions options_;
  const bool lagging_;
  PatternSource source_;
  std::unique_ptr<Device> device_;
  std::unique_ptr<SlicePager> pager_;
  int steps_ = 0;
  ResidencyVersion version_;
  std::vector<SliceId> read_;  // by the lagging compute stream, in order
  std::vector<std::byte> read_bytes_;
  std::vector<std::byte> slow_;
  std::string failure_;
};

}  // namespace lighter::offload
