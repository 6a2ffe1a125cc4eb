#include "offload/expert_pager.h"

#include <ATen/ops/cat.h>

#include <algorithm>

#include "runtime/moe/packed_ffn.h"
#include "runtime/moe/routed_sum.h"
#include "runtime/torch/tensors.h"

namespace lighter::offload {
namespace {

// From this share of a layer's experts on, all of them are streamed.
constexpr double kStreamingShare = 0.75;

}  // namespace

ExpertPager::ExpertPager(Device& device, const ExpertGrid& grid, std::unique_ptr<SliceFormat> format,
                         const PagerOptions& options, int hint_depth,
                         const std::optional<BatchShareOptions>& share, std::shared_ptr<ExpertStore> kept)
    : device_(device),
      grid_(grid),
      format_(std::move(format)),
      hint_depth_(hint_depth),
      reading_(device),
      pager_(device, grid, options, std::move(kept)) {
  if (!share) return;
  share_ = std::make_unique<BatchShare>(*share, device, [this] { return pager_.copying(); });
  pager_.set_device_share(share_->device_share());
}

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

// One copy for the routing and all hints.
ExpertPager::Read ExpertPager::start_reading(const MoeStep& step) {
  Read read;
  std::vector<at::Tensor> all = {step.experts};
  for (const RoutingHint& hint : step.hints) all.push_back(hint.experts);
  if (share_ != nullptr && step.experts.numel() <= kMostSharedChoices && step.experts.size(0) > 1) {
    read.hidden = reading_.start(step.hidden.to(at::kFloat));
    read.weights = reading_.start(step.weights.to(at::kFloat).contiguous());
  }
  read.experts = reading_.start(at::cat(all));
  return read;
}

void ExpertPager::enqueue(int layer, const MoeStep& step, at::Tensor& out) {
  const Read read = start_reading(step);
  // The device has this to do while the host waits and thinks.
  at::Tensor shared;
  if (!shared_.empty()) shared = shared_output(device_, step.hidden, shared_[layer]);
  reading_.wait();
  if (share_ != nullptr) share_->settle();  // of the layer before
  const int64_t tokens = step.experts.size(0);
  const HostRouting routing = group_by_expert(read.experts.narrow(0, 0, tokens), grid_.experts);
  const bool streaming =
      static_cast<double>(routing.experts.size()) >= kStreamingShare * static_cast<double>(grid_.experts);
  if (!streaming) {
    for (size_t i = 0; i < step.hints.size(); ++i) {
      const auto guess = read.experts.narrow(0, tokens * static_cast<int64_t>(i + 1), tokens);
      pager_.hint(step.hints[i].layer, group_by_expert(guess, grid_.experts).experts);
    }
  }

  LayerWork work;
  const auto suiting = std::ranges::count_if(routing.ranges, BatchShare::suits);
  if (read.hidden.defined() && 2 * suiting >= std::ssize(routing.ranges)) {
    work.may_leave = [&](int expert) { return BatchShare::suits(routing.rows_of(expert)); };
    work.leave = [&](std::span<const SliceId> slices) {
      share_->start(pager_.store(), slices, routing, read.hidden, read.weights, step.weight_on);
    };
  }
  std::optional<RoutedSum> sum;
  work.overlap = [&] { sum.emplace(device_, *format_, step, routing, grid_.slices); };
  work.use = [&](int expert, int first, std::span<const std::byte* const> slices) {
    sum->add(expert, first, slices);
  };
  pager_.visit(layer, routing.experts, streaming, work);
  at::Tensor of_cpu;
  if (share_ != nullptr && share_->started()) {
    of_cpu = share_->result(streaming && pager_.ran_dry());
  }
  sum->finish(of_cpu, shared, out);
}

void ExpertPager::between_steps() {
  pager_.between_steps();
  if (share_ == nullptr) return;
  share_->settle();
  share_->step_ended();
  pager_.set_device_share(share_->device_share());
}

ExpertCounters ExpertPager::counters() const {
  ExpertCounters counters = pager_.counters();
  if (share_ != nullptr) {
    counters.cpu_bytes = share_->bytes();
    counters.cpu_busy_s = share_->busy_s();
  }
  return counters;
}

}  // namespace lighter::offload
