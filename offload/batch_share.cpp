#include "offload/batch_share.h"

#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <vector>

namespace lighter::offload {

BatchShare::BatchShare(const BatchShareOptions& options)
    : kernel_(options.encoding, options.hidden, options.slice_width),
      cpu_({.threads = options.threads}),
      control_(options.device_share, options.follow) {}

bool BatchShare::suits(const HostRouting& routing) {
  return std::ranges::all_of(routing.ranges,
                             [](RowRange rows) { return rows.count <= CpuSliceKernel::kMostTokens; });
}

void BatchShare::start(const ExpertStore& store, std::span<const SliceId> slices, const HostRouting& routing,
                       const at::Tensor& hidden, const at::Tensor& weights, WeightOn weight_on) {
  hidden_ = hidden;
  if (!result_.defined() || result_.sizes() != hidden.sizes())
    result_ = at::empty_like(hidden, hidden.options().pinned_memory(hidden.is_pinned()));
  jobs_.clear(kernel_);
  const int64_t k = weights.size(1);
  const float* weight = weights.const_data_ptr<float>();
  std::vector<TokenUse> uses;
  int expert = -1, id = -1;
  for (const SliceId slice : slices) {
    if (slice.expert != expert) {
      expert = slice.expert;
      const size_t place = std::ranges::lower_bound(routing.experts, expert) - routing.experts.begin();
      const RowRange rows = routing.ranges[place];
      uses.clear();
      for (int64_t i = rows.first; i < rows.first + rows.count; ++i) {
        TokenUse& use = uses.emplace_back();
        use.token = static_cast<int32_t>(routing.rows[i] / k);
        (weight_on == WeightOn::input ? use.in_weight : use.out_weight) = weight[routing.rows[i]];
      }
      id = jobs_.add_expert(uses);
    }
    jobs_.add_job(id, store.address(slice), {0, kernel_.layout().width});
  }
  begin_ = Clock::now();
  cpu_.start(jobs_, hidden_.const_data_ptr<float>(), hidden_.size(0), result_.mutable_data_ptr<float>());
  started_ = true;
}

const at::Tensor& BatchShare::wait() {
  started_ = false;
  cpu_.wait();
  busy_s_ += std::chrono::duration<double>(Clock::now() - begin_).count();
  bytes_ += jobs_.weight_bytes();
  return result_;
}

void BatchShare::layer_ended(bool late) {
  ++layers_;
  late_ += late;
}

void BatchShare::step_ended() {
  control_.step_ended(late_, layers_);
  layers_ = late_ = 0;
}

}  // namespace lighter::offload
