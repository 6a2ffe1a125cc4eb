#include "offload/cpu_share.h"

#include <algorithm>
#include <array>

#include "runtime/error.h"
#include "runtime/kernels/decode.h"
#include "runtime/step_number.h"

namespace lighter::offload {
namespace {

CpuExpertsOptions with_width(CpuExpertsOptions options, int64_t width) {
  options.expert_width = width;
  return options;
}

}  // namespace

CpuShare::CpuShare(const ExpertGrid& grid, SliceEncoding encoding, int64_t hidden, int64_t slice_width,
                   WeightOn weight_on, const CpuExpertsOptions& options)
    : grid_(grid),
      kernel_(encoding, hidden, slice_width),
      weight_on_(weight_on),
      cpu_(with_width(options, grid.slices * slice_width)) {}

void CpuShare::start(const MissWork& work, uint32_t first_step) {
  const MissMailboxShape& shape = work.mailbox.shape();
  if (shape.tokens > CpuSliceKernel::kMostTokens) {
    throw DeviceError("a mailbox for " + std::to_string(shape.tokens) + " tokens; the CPU's share takes " +
                      std::to_string(CpuSliceKernel::kMostTokens));
  }
  const auto& layout = kernel_.layout();
  if (shape.hidden != layout.hidden || shape.group != group_size(layout.encoding)) {
    throw DeviceError("a mailbox for " + std::to_string(shape.hidden) + " values in groups of " +
                      std::to_string(shape.group) + "; the CPU's share takes " +
                      std::to_string(layout.hidden) + " in groups of " +
                      std::to_string(group_size(layout.encoding)));
  }
  cpu_.start_polling(
      work.mailbox,
      [this, work](int layer, const MissPost& post, CpuJobs& jobs) { list(work, layer, post, jobs); },
      first_step);
}

void CpuShare::list(const MissWork& work, int layer, const MissPost& post, CpuJobs& jobs) const {
  jobs.clear(kernel_);
  const int k = work.mailbox.shape().experts_per_token;
  const int64_t choices = post.tokens * k;
  const int64_t group = group_size(kernel_.layout().encoding), width = kernel_.layout().width;
  const auto slices_of = [&](int expert) {
    return work.places->device.begin() + static_cast<int64_t>(grid_.index({layer, expert, 0}));
  };
  int missed = 0;
  for_posted(post, k, grid_.experts, [&](int e) {
    missed += static_cast<int>(std::count(slices_of(e), slices_of(e) + grid_.slices, nullptr));
  });
  // The device has the first groups of the missed ones.
  const unsigned share = work.device_shares[slot_of(post.step)].load(std::memory_order_relaxed);
  int64_t not_mine = kernels::zero_copy_groups(static_cast<int>(missed * (width / group)), share) * group;
  for_posted(post, k, grid_.experts, [&](int e) {
    int id = -1;
    for (int slice = 0; slice < grid_.slices; ++slice) {
      if (slices_of(e)[slice] != nullptr) continue;
      const int64_t begin = std::min(not_mine, width);
      not_mine -= begin;
      if (begin == width) continue;
      if (id < 0) {
        std::array<TokenUse, CpuSliceKernel::kMostTokens> uses;
        size_t count = 0;
        for (int64_t i = 0; i < choices; ++i) {
          if (post.experts[i] != e) continue;
          TokenUse& use = uses[count++];
          use.token = static_cast<int32_t>(i / k);
          if (post.is_expected()) continue;
          use.in_weight = post.factors[use.token];
          if (weight_on_ == WeightOn::input) {
            use.in_weight *= post.weights[i];
          } else {
            use.out_weight = post.weights[i];
          }
        }
        id = jobs.add_expert({uses.data(), count});
      }
      jobs.add_job(id, work.places->host[grid_.index({layer, e, slice})], {begin, width});
    }
  });
}

MissWorkersCounters CpuShare::counters() const {
  const CpuExpertsCounters counters = cpu_.counters();
  return {counters.bytes, counters.busy_s, counters.layers, counters.layers_expected};
}

}  // namespace lighter::offload
