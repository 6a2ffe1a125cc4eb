// One MoE layer's routed computation, expert by expert, shared by all executors so that their results are
// equal bit for bit.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <memory>
#include <span>
#include <vector>

#include "runtime/device/device.h"
#include "runtime/moe/expert_executor.h"
#include "runtime/moe/slice_format.h"

namespace lighter {

// The routing of a layer as the host sees it. A choice is token · k + rank.
struct HostRouting {
  std::vector<int> experts;      // chosen by any token, ascending
  std::vector<RowRange> ranges;  // for each of them: its choices in `rows`
  std::vector<int64_t> rows;     // all choices, by expert, then ascending
  std::vector<int64_t>
      places;  // [k, tokens]: where a token's choices stand in `rows`, its lowest expert first

  // Of one of the chosen experts.
  RowRange rows_of(int expert) const {
    return ranges[std::ranges::lower_bound(experts, expert) - experts.begin()];
  }
};

// experts: [tokens, k] int64 on the host.
HostRouting group_by_expert(const at::Tensor& experts, int expert_count);

// Reads tensors of the step's device on the host while work goes on there.
class HostReading {
 public:
  explicit HostReading(Device& device) : device_(device), done_(device.new_event()) {}

  // Enqueues the reading; the result is there after wait().
  at::Tensor start(const at::Tensor& tensor);
  void wait();

 private:
  Device& device_;
  std::unique_ptr<Event> done_;
};

// Call add() for all slices of routing.experts in ascending order, then finish().
class RoutedSum {
 public:
  // slices: of an expert.
  RoutedSum(Device& device, const SliceFormat& format, const MoeStep& step, const HostRouting& routing,
            int slices);

  // Enqueues the share of some slices of an expert, `first` and the following. slices: packed, on the device.
  void add(int expert, int first, std::span<const std::byte* const> slices);
  // further: [tokens, hidden] fp32, computed elsewhere, or undefined. shared: [tokens, hidden], or undefined.
  // out: [tokens, hidden].
  void finish(const at::Tensor& further, const at::Tensor& shared, at::Tensor& out);

 private:
  void end_expert();

  Device& device_;
  const SliceFormat& format_;
  const MoeStep& step_;
  const HostRouting& routing_;
  at::Tensor rows_;    // routing.rows on the device
  at::Tensor places_;  // [k, tokens] on the device
  RoutedInput input_;
  bool begun_ = false;
  size_t position_ = 0;  // in routing.experts, of the one being summed
};

}  // namespace lighter
