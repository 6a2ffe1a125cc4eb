#include "offload/expert_pager.h"

#include <ATen/ops/cat.h>

#include "runtime/moe/routed_sum.h"
#include "runtime/moe/swiglu.h"

namespace lighter::offload {
namespace {

// From this share of a layer's experts on, all of them are streamed.
constexpr double kStreamingShare = 0.75;

}  // namespace

ExpertPager::ExpertPager(Device& device, const ExpertGrid& grid, std::unique_ptr<SliceFormat> format,
                         const PagerOptions& options, int hint_depth)
    : device_(device),
      grid_(grid),
      format_(std::move(format)),
      hint_depth_(hint_depth),
      pager_(device, grid, options) {}

void ExpertPager::prepare(const StepLimits&, std::vector<SharedExpert> shared) {
  shared_ = std::move(shared);
}

void ExpertPager::enqueue(int layer, const MoeStep& step, at::Tensor& out) {
  // One copy to the host for the routing and all hints: each waits for the device.
  std::vector<at::Tensor> all = {step.experts};
  for (const RoutingHint& hint : step.hints) all.push_back(hint.experts);
  const at::Tensor on_host = at::cat(all).cpu();
  const int64_t tokens = step.experts.size(0);
  const HostRouting routing = group_by_expert(on_host.narrow(0, 0, tokens), grid_.experts);
  const bool streaming =
      static_cast<double>(routing.experts.size()) >= kStreamingShare * static_cast<double>(grid_.experts);
  if (!streaming) {
    for (size_t i = 0; i < step.hints.size(); ++i) {
      const auto guess = on_host.narrow(0, tokens * static_cast<int64_t>(i + 1), tokens);
      pager_.hint(step.hints[i].layer, group_by_expert(guess, grid_.experts).experts);
    }
  }

  at::Tensor shared;
  RoutedSum sum(device_, *format_, step, routing);
  pager_.visit(
      layer, routing.experts, streaming,
      [&] {
        if (!shared_.empty()) shared = swiglu(step.hidden, shared_[layer].gate_up, shared_[layer].down);
      },
      [&](SliceId slice, const std::byte* address) { sum.add(slice.expert, address); });
  sum.finish(shared, out);
}

}  // namespace lighter::offload
