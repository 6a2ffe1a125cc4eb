// The composition root: builds device, weights, cache, executor and decoder as planned, in an order in which
// no budget is passed, and takes them down in the opposite order.
#pragma once

#include <atomic>
#include <memory>
#include <optional>

#include "models/decoder.h"
#include "models/routing_schedule.h"
#include "models/tensor_source.h"
#include "offload/expert_store.h"
#include "runtime/cli/prepared_model.h"
#include "runtime/device/device.h"
#include "runtime/moe/expert_executor.h"
#include "runtime/progress.h"
#include "runtime/torch/torch_scope.h"

namespace lighter::cli {

std::unique_ptr<Device> make_device(const Config& config);

// Who chooses the experts as configured; empty: the router.
models::RoutingSchedule make_schedule(const RoutingConfig& routing, const models::ModelSpec& spec);

// Whether the CPU computes a part of the missed slices in steps of several tokens: short prompts and, where
// there are several sequences, what decodes them.
bool cpu_shares_prompts(const PreparedModel& model, const Config& config);
bool cpu_shares_batches(const PreparedModel& model, const Config& config);

class Session {
 public:
  // Throws CapacityError when the plan does not fit, before anything is allocated.
  // schedule: who chooses the experts; empty: what the configuration says. kept: a store of this model's
  // experts, with a home for every slice, that outlives the session; it is filled if it is not yet. workers:
  // in place of those that see to a decode graph's misses (tests).
  Session(const Config& config, const PreparedModel& model, const Progress& progress,
          models::ScheduledRouting schedule = {}, std::shared_ptr<offload::ExpertStore> kept = nullptr,
          std::unique_ptr<MissWorkers> workers = nullptr);
  ~Session();

  models::Decoder& decoder() { return *decoder_; }
  Device& device() { return *device_; }
  ExpertCounters counters() const;
  // What the CPU's workers did last, if there are any. After Model::rest().
  std::vector<MissSpan> latest_cpu_spans() const;

  // On the CPU: the budget's entries at their peak, the workspace as far as it was used. On CUDA: what the
  // driver says is in use; nothing is given back before the session ends, so that is the peak.
  uint64_t device_peak_bytes() const;
  uint64_t host_peak_bytes() const { return device_->host_budget().peak_bytes(); }
  uint64_t workspace_peak_bytes() const { return torch_->peak_bytes(); }

 private:
  struct Threads;

  std::unique_ptr<Threads> threads_;
  std::unique_ptr<Device> device_;
  models::ModelSpec spec_;
  std::unique_ptr<TorchScope> torch_;
  std::unique_ptr<models::TensorSource> source_;
  std::unique_ptr<models::LoadedWeights> weights_;
  std::unique_ptr<KvCache> kv_;
  std::unique_ptr<ExpertExecutor> executor_;
  std::unique_ptr<MissWorkers> workers_;
  std::unique_ptr<models::Decoder> decoder_;
};

}  // namespace lighter::cli
