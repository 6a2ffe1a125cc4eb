#include "offload/batch_share.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <new>
#include <utility>
#include <vector>

#include "runtime/torch/tensors.h"

namespace lighter::offload {

BatchShare::BatchShare(const BatchShareOptions& options, Device& device, std::function<bool()> copying)
    : device_(device),
      copying_(std::move(copying)),
      kernel_(options.encoding, options.hidden, options.slice_width),
      control_(options.device_share, options.follow),
      word_memory_(at::empty({1}, at::TensorOptions(at::kInt).pinned_memory(device.is_cuda()))),
      word_(*new (word_memory_.mutable_data_ptr()) std::atomic<uint32_t>(0)),
      cpu_({.threads = options.threads}) {}

// The device may still look at the word.
BatchShare::~BatchShare() {
  const auto try_to = [](const auto& act) {
    try {
      act();
    } catch (const std::exception& error) {
      spdlog::error("{}", error.what());
    }
  };
  try_to([&] { settle(); });
  try_to([&] { device_.compute_stream().synchronize(); });
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
      const RowRange rows = routing.rows_of(expert);
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
  known_late_.reset();
  ++layer_;
  begin_ = Clock::now();
  cpu_.start(jobs_, hidden_.const_data_ptr<float>(), hidden_.size(0), result_.mutable_data_ptr<float>(),
             [this] { ended(); });
  started_ = true;
  bytes_ += jobs_.weight_bytes();
}

void BatchShare::ended() {
  word_.store(layer_, std::memory_order_release);
  word_.notify_all();
  end_ = Clock::now();
  try {
    link_was_idle_ = !copying_();
  } catch (const std::exception& error) {
    spdlog::error("{}", error.what());  // the step will meet it, too
  }
}

at::Tensor BatchShare::result(bool ran_dry) {
  const bool early = word_.load(std::memory_order_acquire) == layer_;  // when not all copies were queued yet
  if (ran_dry || early) known_late_ = ran_dry || !copying_();
  device_.hold_until(word_, layer_);
  return view_of(result_.const_data_ptr(), result_.sizes(), device_, DType::fp32);
}

void BatchShare::settle() {
  if (!std::exchange(started_, false)) return;
  cpu_.wait();
  busy_s_ += std::chrono::duration<double>(end_ - begin_).count();
  ++layers_;
  late_ += known_late_.value_or(link_was_idle_);
}

void BatchShare::step_ended() {
  control_.step_ended(late_, layers_);
  layers_ = late_ = 0;
}

}  // namespace lighter::offload
