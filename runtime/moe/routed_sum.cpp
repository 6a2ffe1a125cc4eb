#include "runtime/moe/routed_sum.h"

#include "runtime/torch/tensors.h"

namespace lighter {

HostRouting group_by_expert(const at::Tensor& experts, int expert_count) {
  const int64_t tokens = experts.size(0), k = experts.size(1);
  const int64_t* chosen = experts.const_data_ptr<int64_t>();
  std::vector<int64_t> counts(expert_count);
  for (int64_t i = 0; i < tokens * k; ++i) ++counts[chosen[i]];
  HostRouting routing;
  std::vector<int64_t> next(expert_count);
  int64_t first = 0;
  for (int expert = 0; expert < expert_count; ++expert) {
    next[expert] = first;
    if (counts[expert] == 0) continue;
    routing.experts.push_back(expert);
    routing.ranges.push_back({first, counts[expert]});
    first += counts[expert];
  }
  routing.rows.resize(tokens * k);
  for (int64_t i = 0; i < tokens * k; ++i) routing.rows[next[chosen[i]]++] = i;
  routing.places.resize(tokens * k);
  std::vector<int> seen(tokens);
  for (int64_t row = 0; row < tokens * k; ++row) {
    const int64_t token = routing.rows[row] / k;
    routing.places[seen[token]++ * tokens + token] = row;
  }
  return routing;
}

// libtorch takes page-locked memory for a copy that does not wait.
at::Tensor HostReading::start(const at::Tensor& tensor) {
  const at::Tensor on_host = tensor.to(at::kCPU, true);
  device_.compute_stream().record(*done_);
  return on_host;
}

void HostReading::wait() {
  done_->wait_on_host();
}

RoutedSum::RoutedSum(Device& device, const SliceFormat& format, const MoeStep& step,
                     const HostRouting& routing, int slices)
    : device_(device), format_(format), step_(step), routing_(routing) {
  const int64_t tokens = step.experts.size(0), k = step.experts.size(1);
  rows_ = to_device(routing.rows, device);
  places_ = to_device(routing.places, device).view({k, tokens});
  at::Tensor x = step.hidden.index_select(0, k == 1 ? rows_ : rows_.floor_divide(k));
  if (step.weight_on == WeightOn::input) {
    const at::Tensor weights = step.weights.reshape({-1}).index_select(0, rows_).unsqueeze(1);
    x = x.mul(weights).to(x.scalar_type());
  }
  input_ = format.prepare(device, x, routing.ranges, slices);
}

void RoutedSum::add(int expert, int first, std::span<const std::byte* const> slices) {
  if (!begun_ || routing_.experts[position_] != expert) {
    end_expert();
    begun_ = true;
    while (routing_.experts[position_] != expert) ++position_;
  }
  format_.accumulate(device_, first, slices, input_, routing_.ranges[position_]);
}

void RoutedSum::end_expert() {
  if (begun_) format_.finish(device_, input_, routing_.ranges[position_]);
}

void RoutedSum::finish(const at::Tensor& further, const at::Tensor& shared, at::Tensor& out) {
  end_expert();
  begun_ = false;
  const at::Tensor sum = input_.sum;
  input_ = {};       // gives its room back
  at::Tensor total;  // [tokens, hidden] fp32
  for (int64_t i = 0; i < places_.size(0); ++i) {
    const at::Tensor places = places_[i];
    at::Tensor part = sum.index_select(0, places);
    if (step_.weight_on == WeightOn::output) {
      const at::Tensor choices = rows_.index_select(0, places);
      part.mul_(step_.weights.reshape({-1}).index_select(0, choices).unsqueeze(1));
    }
    total = total.defined() ? total.add_(part) : part;
  }
  if (further.defined()) total.add_(further);
  if (shared.defined()) total.add_(shared);
  out.copy_(total);
}

}  // namespace lighter
