// One MoE layer's routed computation, slice by slice, shared by all executors so that their results are equal
// bit for bit.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "runtime/device/device.h"
#include "runtime/moe/expert_executor.h"
#include "runtime/moe/slice_format.h"

namespace lighter {

// The routing of a layer as the host sees it.
struct HostRouting {
  std::vector<int> experts;                // chosen by any token, ascending
  std::vector<std::vector<int64_t>> rows;  // for each of them: its tokens, as token · k + rank, ascending
};

// experts: [tokens, k] int64 on the host.
HostRouting group_by_expert(const at::Tensor& experts, int expert_count);

// Call add() for every slice of routing.experts in ascending order, then finish().
class RoutedSum {
 public:
  RoutedSum(Device& device, const SliceFormat& format, const MoeStep& step, const HostRouting& routing);

  // Enqueues one slice's share. slice: its packed weights, on the device.
  void add(int expert, const std::byte* slice);
  // shared: [tokens, hidden], or undefined. out: [tokens, hidden].
  void finish(const at::Tensor& shared, at::Tensor& out);

 private:
  void begin_expert(int expert);
  void end_expert();

  Device& device_;
  const SliceFormat& format_;
  const MoeStep& step_;
  const HostRouting& routing_;
  at::Tensor rows_;         // all of routing.rows in one, on the device
  at::Tensor total_;        // [tokens, hidden] fp32
  int expert_ = -1;         // the one being summed
  size_t position_ = 0;     // its place in routing.experts
  int64_t rows_begin_ = 0;  // of its rows in rows_
  at::Tensor token_rows_;   // [its tokens]
  ExpertInput input_;       // [its tokens, hidden]
  at::Tensor weights_;      // [its tokens, 1]
  at::Tensor sum_;          // [its tokens, hidden] fp32
};

}  // namespace lighter
