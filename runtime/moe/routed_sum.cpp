#include "runtime/moe/routed_sum.h"

#include <ATen/ops/zeros.h>

#include "runtime/torch/tensors.h"

namespace lighter {

HostRouting group_by_expert(const at::Tensor& experts, int expert_count) {
  std::vector<std::vector<int64_t>> rows(expert_count);
  const int64_t* chosen = experts.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < experts.numel(); ++i) rows[chosen[i]].push_back(i);
  HostRouting routing;
  for (int expert = 0; expert < expert_count; ++expert) {
    if (rows[expert].empty()) continue;
    routing.experts.push_back(expert);
    routing.rows.push_back(std::move(rows[expert]));
  }
  return routing;
}

RoutedSum::RoutedSum(Device& device, const SliceFormat& format, const MoeStep& step,
                     const HostRouting& routing)
    : device_(device), format_(format), step_(step), routing_(routing) {
  std::vector<int64_t> all;
  for (const auto& rows : routing.rows) all.insert(all.end(), rows.begin(), rows.end());
  rows_ = to_device(all, device);
  total_ = at::zeros(step.hidden.sizes(), step.hidden.options().dtype(at::kFloat));
}

void RoutedSum::add(int expert, const std::byte* slice) {
  if (expert != expert_) {
    end_expert();
    begin_expert(expert);
  }
  format_.accumulate(device_, slice, input_, sum_);
}

void RoutedSum::begin_expert(int expert) {
  while (routing_.experts[position_] != expert) rows_begin_ += routing_.rows[position_++].size();
  expert_ = expert;
  const auto count = static_cast<int64_t>(routing_.rows[position_].size());
  const at::Tensor rows = rows_.narrow(0, rows_begin_, count);
  token_rows_ = rows.floor_divide(step_.experts.size(1));
  at::Tensor x = step_.hidden.index_select(0, token_rows_);
  weights_ = step_.weights.reshape({-1}).index_select(0, rows).unsqueeze(1);
  if (step_.weight_on == WeightOn::input) x = x.mul(weights_).to(x.scalar_type());
  input_ = format_.prepare(device_, x);
  sum_ = at::zeros(x.sizes(), total_.options());
}

void RoutedSum::end_expert() {
  if (expert_ < 0) return;
  if (step_.weight_on == WeightOn::output) sum_ = sum_.mul(weights_);
  total_.index_add_(0, token_rows_, sum_);
}

void RoutedSum::finish(const at::Tensor& shared, at::Tensor& out) {
  end_expert();
  expert_ = -1;
  if (shared.defined()) total_.add_(shared);
  out.copy_(total_);
}

}  // namespace lighter
