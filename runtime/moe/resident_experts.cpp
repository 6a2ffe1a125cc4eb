#include "runtime/moe/resident_experts.h"

#include "runtime/moe/packed_ffn.h"

namespace lighter {

ResidentExperts::ResidentExperts(Device& device, const ExpertGrid& grid, std::unique_ptr<SliceFormat> format)
    : device_(device),
      grid_(grid),
      format_(std::move(format)),
      reading_(device),
      memory_(device.allocate(grid.total_bytes(), "experts")) {}

void ResidentExperts::load(const SliceSource& source, const Progress& progress) {
  const Buffer staging = device_.allocate_host(grid_.expert_bytes(), "staging for loading");
  const auto stream = device_.new_copy_stream();
  std::vector<std::byte*> targets;
  for (int i = 0; i < grid_.slices; ++i) targets.push_back(staging.data() + i * grid_.slice_bytes);
  uint64_t done = 0;
  for (int layer = 0; layer < grid_.layers; ++layer) {
    for (int expert = 0; expert < grid_.experts; ++expert) {
      source.read_expert({layer, expert}, targets);
      stream->copy(memory_.data() + done, staging.data(), grid_.expert_bytes());
      stream->synchronize();
      done += grid_.expert_bytes();
      progress("loading experts", done, grid_.total_bytes());
    }
  }
}

SlicePlaces ResidentExperts::slice_places() const {
  SlicePlaces places{1, {}, {}};
  for (size_t i = 0; i < grid_.total_slices(); ++i)
    places.device.push_back(memory_.data() + i * grid_.slice_bytes);
  places.host.resize(places.device.size());
  return places;
}

void ResidentExperts::prepare(const StepLimits&, std::vector<SharedExpert> shared) {
  shared_ = std::move(shared);
}

void ResidentExperts::enqueue(int layer, const MoeStep& step, at::Tensor& out) {
  const at::Tensor experts = reading_.start(step.experts);
  at::Tensor shared;
  if (!shared_.empty()) shared = shared_output(device_, step.hidden, shared_[layer]);
  reading_.wait();
  const HostRouting routing = group_by_expert(experts, grid_.experts);
  RoutedSum sum(device_, *format_, step, routing, grid_.slices);
  std::vector<const std::byte*> slices(grid_.slices);
  for (const int expert : routing.experts) {
    for (int i = 0; i < grid_.slices; ++i) {
      slices[i] = memory_.data() + grid_.index({layer, expert, i}) * grid_.slice_bytes;
    }
    sum.add(expert, 0, slices);
  }
  sum.finish({}, shared, out);
  counters_.slices_used += routing.experts.size() * grid_.slices;
  counters_.slices_resident += routing.experts.size() * grid_.slices;
}

}  // namespace lighter
