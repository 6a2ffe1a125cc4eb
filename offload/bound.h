// The least time that a decode step can take on a machine, from the bytes that it must read and the rates at
// which they can be read. Pure; thread-safe.
//
// Every weight that is active is read once: what is resident by the device, what is missed over the link, by
// the CPU, or by both at once. All experts have the same share of their slices resident, so in each layer the
// device computes the shared expert and the resident slices while the missed ones are seen to; attention,
// dense layers, the head and the KV cache stay outside of that overlap:
//
//   step = (fixed - shared + kv) / device_read + max(missed / rate of the way, (shared + resident) /
//   device_read)
//
// It holds for routing that nobody can guess. Skewed routing does better by a hit rate above the resident
// share, so where a hit rate was measured, a higher one stands for the share.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace lighter::offload {

// Ceilings of a machine in GB/s (1e9); absent: not known.
struct Rates {
  std::optional<double> device_read;  // device memory, read by the device
  std::optional<double> link;         // pinned host memory → device
  std::optional<double> cpu_read;     // host memory, read by the CPU while the link is idle
  std::optional<double> both;         // CPU and link at the same time, together
};

// Which way missed bytes go.
enum class MissWay { link, cpu, both };
const char* miss_way_name(MissWay way);

// What one decode step of one sequence reads. Bytes.
struct StepBytes {
  uint64_t fixed = 0;   // all weights but the routed experts and the embedding, shared experts included
  uint64_t shared = 0;  // the shared experts of all layers
  uint64_t expert = 0;  // one routed expert
  int moe_layers = 0;
  int experts = 0;  // of a layer
  int experts_per_token = 0;
  uint64_t kv_per_token = 0;  // all layers
};

// The mean number of distinct experts of a layer that a batch needs under uniform routing.
double distinct_experts(int experts, int experts_per_token, int batch);

// Bytes of the routed experts that a batch needs, all layers together, resident or not.
double routed_bytes(const StepBytes& bytes, int batch);

// Seconds; context: tokens whose keys and values are read, for each sequence. Nothing where a rate that it
// needs is not known.
std::optional<double> step_bound_s(const StepBytes& bytes, double resident_share, MissWay way,
                                   const Rates& rates, int batch, double context);

}  // namespace lighter::offload
