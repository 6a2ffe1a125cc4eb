#include "offload/expert_pager.h"

#include <ATen/ops/cat.h>

#include "runtime/moe/packed_ffn.h"
#include "runtime/moe/routed_sum.h"

namespace lighter::offload {
namespace {

// From this share of a layer's experts on, all of them are streamed.
constexpr double kStreamingShare = 0.75;

}  // namespace

ExpertPager::ExpertPager(Device& device, const ExpertGrid& grid, std::unique_ptr<SliceFormat> format,
                         const PagerOptions& options, int hint_depth, std::shared_ptr<ExpertStore> kept)
    : device_(device),
      grid_(grid),
      format_(std::move(format)),
      hint_depth_(hint_depth),
      pager_(device, grid, options, std::move(kept)) {}

void ExpertPager::prepare(const StepLimits&, std::vector<SharedExpert> shared) {
  shared_ = std::move(shared);
}

SlicePlaces ExpertPager::slice_places() const {
  const ResidencyVersion residency = pager_.residency();
  SlicePlaces places{places_version(), {}, {}};
  for (int layer = 0; layer < grid_.layers; ++layer) {
    for (size_t i = 0; i < grid_.slices_per_layer(); ++i) {
      const SliceId slice{layer, static_cast<int>(i) / grid_.slices, static_cast<int>(i) % grid_.slices};
      const SliceLocation& at = residency->at(slice);
      places.device.push_back(at.on_device() ? at.address : nullptr);
      places.host.push_back(pager_.store().address(slice));
    }
  }
  return places;
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
        if (!shared_.empty()) shared = shared_output(device_, step.hidden, shared_[layer]);
      },
      [&](SliceId slice, const std::byte* address) { sum.add(slice.expert, address); });
  sum.finish(shared, out);
}

}  // namespace lighter::offload
