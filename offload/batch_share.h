// The CPU's part of the layers of a step of several tokens, of one sequence or of many: slices that the
// device leaves over, for the tokens that chose their experts; and the device's share of the absent slices,
// which follows who is the last to finish. Not thread-safe.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <optional>
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
  double device_share = 0.4;  // the first one
  bool follow = true;         // whether it changes
  int threads = 0;            // 0: all cores but one
};

class BatchShare {
 public:
  // Throws ConfigError for shapes that packed slices cannot have.
  // copying: whether the link is busy; a worker asks it, too.
  BatchShare(const BatchShareOptions& options, Device& device, std::function<bool()> copying);
  ~BatchShare();

  // Whether the CPU is of use for an expert: it has not so many tokens that the device unpacks it.
  static bool suits(RowRange rows) { return rows.count <= CpuSliceKernel::kMostTokens; }
  // The device's share of the absent slices, between 0 and 1.
  double device_share() const { return control_.device_share() / static_cast<double>(ShareControl::kWhole); }

  // One layer: start(), result() if it has started, and settle() before the next start().

  // slices: ascending. hidden: [tokens, hidden] fp32; weights: [tokens, k] fp32; both on the host.
  void start(const ExpertStore& store, std::span<const SliceId> slices, const HostRouting& routing,
             const at::Tensor& hidden, const at::Tensor& weights, WeightOn weight_on);
  bool started() const { return started_; }
  // The sum over the slices, [tokens, hidden] fp32, for what the compute stream does from now on: it holds
  // until the CPU is done, while the host goes on and enqueues what comes after. The device reads it in host
  // memory: a copy would wait for all slices that are on their way. The next start() overwrites it. Call
  // it when the layer's copies are queued. ran_dry: the link had nothing left when the next layer's were.
  at::Tensor result(bool ran_dry);
  // Waits until the CPU is done, if it was started. Throws DeviceError: what a worker met.
  void settle();
  void step_ended();

  uint64_t bytes() const { return bytes_; }
  // From a start until the CPU was done.
  double busy_s() const { return busy_s_; }

 private:
  using Clock = std::chrono::steady_clock;

  void ended();

  Device& device_;
  const std::function<bool()> copying_;
  const CpuSliceKernel kernel_;
  ShareControl control_;
  CpuJobs jobs_;
  bool started_ = false;
  at::Tensor hidden_, result_;
  const at::Tensor word_memory_;
  std::atomic<uint32_t>& word_;  // counts the layers that the CPU has done
  uint32_t layer_ = 0;
  Clock::time_point begin_;
  Clock::time_point end_;  // this and the next: by the last worker
  bool link_was_idle_ = false;
  // Whether the link could have had more to do, if that did not have to wait for the CPU's end.
  std::optional<bool> known_late_;
  uint64_t bytes_ = 0;
  double busy_s_ = 0;
  int layers_ = 0, late_ = 0;  // of this step
  CpuExperts cpu_;             // its workers use what is above
};

}  // namespace lighter::offload
