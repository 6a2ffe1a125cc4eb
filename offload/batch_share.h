// The CPU's part of the layers of a step of many sequences: slices that the device leaves over, for the
// tokens that chose their experts; and the device's share of the absent slices, which follows who is the last
// to finish. Not thread-safe.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <span>

#include "offload/cpu_experts.h"
#include "offload/expert_store.h"
#include "runtime/moe/expert_executor.h"
#include "runtime/moe/routed_sum.h"
#include "runtime/moe/share_control.h"
#include "runtime/quant/cpu_slice.h"

namespace lighter::offload {

struct BatchShareOptions {
  SliceEncoding encoding = SliceEncoding::int8;
  int64_t hidden = 0;
  int64_t slice_width = 0;
  double device_share = 0.5;  // the first one
  bool follow = true;         // whether it changes
  int threads = 0;            // 0: all cores but one
};

class BatchShare {
 public:
  // Throws ConfigError for shapes that packed slices cannot have.
  explicit BatchShare(const BatchShareOptions& options);

  // Whether the CPU is of use in such a layer: no expert has so many tokens that the device unpacks it.
  static bool suits(const HostRouting& routing);
  // The device's share of the absent slices, between 0 and 1.
  double device_share() const { return control_.device_share() / static_cast<double>(ShareControl::kWhole); }

  // slices: ascending. hidden: [tokens, hidden] fp32; weights: [tokens, k] fp32; both on the host.
  void start(const ExpertStore& store, std::span<const SliceId> slices, const HostRouting& routing,
             const at::Tensor& hidden, const at::Tensor& weights, WeightOn weight_on);
  bool started() const { return started_; }
  // The sum over the slices, [tokens, hidden] fp32 on the host, page-locked as hidden is; the next start()
  // overwrites it. Throws DeviceError: what a worker met.
  const at::Tensor& wait();
  // late: the link could have had more to copy: it had nothing left when the CPU was done, or, where it
  // copies the next layer's slices ahead, when those were queued.
  void layer_ended(bool late);
  void step_ended();

  uint64_t bytes() const { return bytes_; }
  // From a start until its result was taken.
  double busy_s() const { return busy_s_; }

 private:
  using Clock = std::chrono::steady_clock;

  const CpuSliceKernel kernel_;
  CpuExperts cpu_;
  ShareControl control_;
  CpuJobs jobs_;
  bool started_ = false;
  at::Tensor hidden_, result_;
  Clock::time_point begin_;
  uint64_t bytes_ = 0;
  double busy_s_ = 0;
  int layers_ = 0, late_ = 0;  // of this step
};

}  // namespace lighter::offload
