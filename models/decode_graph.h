// Decoding without the host: one token of one sequence as one CUDA graph, from the token's id to the next
// one's. What changes from step to step (token, position, KV blocks, step number) is written to mapped memory
// before the graph is launched; a token can be the one that the step before has found. Slices that are not
// resident are read by the GPU from host memory, or computed by workers on the CPU, or both, or copied to the
// GPU, beside the work on resident ones; see runtime/kernels/decode.h.
//
// Built for one model on one device; not thread-safe. Steps throw DeviceError.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <string>

#include "models/model_spec.h"
#include "models/routing_schedule.h"
#include "models/weight_formats.h"
#include "models/weights.h"
#include "runtime/kv/kv_cache.h"
#include "runtime/moe/expert_executor.h"
#include "runtime/moe/miss_workers.h"

namespace lighter::models {

// What it takes beside the weights. experts: of no layers for a dense model.
struct DecodeGraphShape {
  const ModelSpec& spec;
  const WeightFormats& formats;
  ExpertGrid experts;
  SliceEncoding encoding = SliceEncoding::dense;
  int64_t slice_width = 0;
  int64_t context = 0;
  int64_t kv_block = 0;
  bool all_resident = true;
  bool with_workers = false;  // some missed slices are computed by the CPU
  bool fetches = false;       // missed slices are copied to the device by workers
};

// Who computes missed slices, or copies them. workers null: the device reads them all from host memory.
struct MissSharing {
  MissWorkers* workers = nullptr;
  double device_share = 1;  // at first
  bool follow = false;      // the share follows who is late
  // The workers are told what the next layer's router makes of the residual stream, and so what they can
  // expect; in models of up to 32 experts in a layer. expected: in its place, where the routing is scheduled;
  // it may have no expectation: -1.
  bool guess = false;
  RoutingSchedule expected = {};
};

class DecodeGraph {
 public:
  virtual ~DecodeGraph() = default;

  // Enqueues the step and waits for it; returns the likeliest next token. goes_on: that token will probably
  // be the next step's. Where no slice changes its place, and none is fetched, that step is then enqueued
  // already, so that the device need not wait for the host; if another one comes instead, it waits for this
  // one's end.
  virtual int64_t step(int64_t token, int64_t position, bool goes_on) = 0;
  // Ends what is enqueued, and lets the workers sleep until the next step. Throws what they met.
  virtual void rest() = 0;
  // [1, vocab] fp32 on the host: of the last step, which must not have been one that goes on.
  virtual at::Tensor logits() const = 0;
  virtual ExpertCounters counters() const = 0;
};

// Empty if the model can be decoded this way, else why not.
std::string why_no_decode_graph(const DecodeGraphShape& shape, bool cuda, DType dtype);
uint64_t decode_graph_device_bytes(const DecodeGraphShape& shape);
uint64_t decode_graph_host_bytes(const DecodeGraphShape& shape);

// All references must outlive it. Throws CapacityError, and ConfigError in a build without CUDA.
std::unique_ptr<DecodeGraph> make_decode_graph(const DecodeGraphShape& shape, const LoadedWeights& weights,
                                               KvCache& kv, ExpertExecutor* executor,
                                               const RoutingSchedule& schedule, const MissSharing& sharing,
                                               Device& device);

}  // namespace lighter::models
