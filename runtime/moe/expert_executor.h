// The seam between a model and the paging of its experts. A model calls enqueue() for each MoE layer and
// knows nothing else: ResidentExperts (everything in device memory: baseline and oracle) and
// offload/ExpertPager stand behind it, and what offloading costs is what swapping them changes.
//
// Routed output, for each token: the sum over its experts, ascending, and their slices, ascending, in fp32;
// so it is the same, bit for bit, wherever a slice lies. Not thread-safe: one thread runs the steps.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <optional>
#include <span>
#include <vector>

#include "runtime/moe/expert_counters.h"
#include "runtime/moe/expert_id.h"
#include "runtime/moe/slice_places.h"
#include "runtime/moe/weight_on.h"
#include "runtime/quant/packed_weight.h"

namespace lighter {

// The expert that serves every token, resident always: two tensors, or packed.
struct SharedExpert {
  at::Tensor gate_up;  // [2 · ffn, hidden]
  at::Tensor down;     // [hidden, ffn]
  std::optional<PackedWeight> packed;
};

// Experts that a coming layer will perhaps choose.
struct RoutingHint {
  int layer = 0;
  at::Tensor experts;  // [tokens, k] int64, on the device
};

struct MoeStep {
  at::Tensor hidden;   // [tokens, hidden_dim], on the device
  at::Tensor experts;  // [tokens, k] int64, on the device
  at::Tensor weights;  // [tokens, k], on the device
  WeightOn weight_on = WeightOn::output;
  std::vector<RoutingHint> hints;
};

struct StepLimits {
  int64_t max_tokens = 0;
};

class ExpertExecutor {
 public:
  virtual ~ExpertExecutor() = default;

  // Allocates everything that steps need. shared: one per MoE layer, or empty.
  virtual void prepare(const StepLimits& limits, std::vector<SharedExpert> shared) = 0;

  // Puts the layer's routed and shared experts on the compute stream: out = shared + routed.
  // out: [tokens, hidden_dim] in the model's dtype, the caller's storage.
  // An executor whose capturable() is true neither allocates, synchronises nor reads device data on the host.
  virtual void enqueue(int layer, const MoeStep& step, at::Tensor& out) = 0;

  // When the step's device work has finished: publishes a new residency, collects counters, and throws what a
  // worker met.
  virtual void between_steps() = 0;

  // A step whose layers did not come through enqueue(), as a decode graph's do not, chose these experts:
  // [layers, k]. Call it after the step, in place of between_steps(); places may change then, and nothing may
  // still use the old ones.
  virtual void learn(std::span<const int>) {}

  virtual bool capturable() const = 0;
  // How many layers ahead hints are useful; 0: none.
  virtual int hint_depth() const { return 0; }
  virtual ExpertCounters counters() const = 0;

  // What they say holds until the next enqueue() or learn().
  virtual SlicePlaces slice_places() const = 0;
  virtual uint64_t places_version() const = 0;
  // Whether learn() changes none of them, so that a step may be enqueued before the one before it has ended.
  virtual bool places_stay() const = 0;
};

}  // namespace lighter
