// What an expert executor did, exactly. Sums since it was made; subtract two to get a span.
#pragma once

#include <cstdint>

namespace lighter {

struct ExpertCounters {
  uint64_t slices_used = 0;        // = resident + prefetched + missed
  uint64_t slices_resident = 0;    // were on the device by residency
  uint64_t slices_prefetched = 0;  // were arriving or had arrived ahead of their layer
  uint64_t slices_missed = 0;      // were asked for by their layer
  uint64_t evictions = 0;
  uint64_t demand_bytes = 0;    // copied, or read by the device from host memory, because a layer needed them
  uint64_t cpu_bytes = 0;       // computed by the CPU instead
  uint64_t prefetch_bytes = 0;  // copied on a guess
  uint64_t prefetch_wasted_bytes = 0;  // copied ahead, on a guess or while streaming, and not needed
  uint64_t demand_busy_bytes = 0;      // moved in demand_busy_s
  double demand_busy_s = 0;            // with a demand copy outstanding, or the device reading host memory
  double stall_s = 0;                  // the device waited for slices, or for the CPU's part of them
  double cpu_busy_s = 0;               // the CPU's workers had cpu_bytes to compute
  uint64_t cpu_layers = 0;  // of which the CPU's workers had something to compute, decoding one sequence
  uint64_t cpu_layers_expected = 0;  // of these, whose experts were those expected

  double hit_rate() const {
    return slices_used == 0 ? 1.0 : static_cast<double>(slices_resident) / static_cast<double>(slices_used);
  }
  uint64_t bytes_moved() const { return demand_bytes + prefetch_bytes; }

  ExpertCounters operator+(const ExpertCounters& other) const {
    ExpertCounters negative;
    return *this - (negative - other);
  }
  ExpertCounters operator-(const ExpertCounters& before) const {
    ExpertCounters d = *this;
    d.slices_used -= before.slices_used;
    d.slices_resident -= before.slices_resident;
    d.slices_prefetched -= before.slices_prefetched;
    d.slices_missed -= before.slices_missed;
    d.evictions -= before.evictions;
    d.demand_bytes -= before.demand_bytes;
    d.cpu_bytes -= before.cpu_bytes;
    d.prefetch_bytes -= before.prefetch_bytes;
    d.prefetch_wasted_bytes -= before.prefetch_wasted_bytes;
    d.demand_busy_bytes -= before.demand_busy_bytes;
    d.demand_busy_s -= before.demand_busy_s;
    d.stall_s -= before.stall_s;
    d.cpu_busy_s -= before.cpu_busy_s;
    d.cpu_layers -= before.cpu_layers;
    d.cpu_layers_expected -= before.cpu_layers_expected;
    return d;
  }
};

}  // namespace lighter
