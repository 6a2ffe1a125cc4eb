#include "offload/cpu_jobs.h"

#include <algorithm>
#include <cassert>

namespace lighter::offload {

void CpuJobs::clear(const CpuSliceKernel& kernel) {
  kernel_ = &kernel;
  jobs_.clear();
  for (const Input& input : inputs_) newest_input_[input.token] = -1;
  inputs_.clear();
  experts_.clear();
  use_inputs_.clear();
  use_tokens_.clear();
  use_weights_.clear();
  all_uses_ = 0;
  hidden_values_ = 0;
  cost_ = 0;
  most_uses_ = 0;
  weight_bytes_ = 0;
}

int CpuJobs::add_expert(std::span<const TokenUse> uses) {
  assert(!uses.empty());
  experts_.push_back({static_cast<int64_t>(use_tokens_.size()), static_cast<int64_t>(uses.size())});
  for (const TokenUse& use : uses) {
    if (newest_input_.size() <= static_cast<size_t>(use.token)) newest_input_.resize(use.token + 1, -1);
    int32_t& input = newest_input_[use.token];
    if (input < 0 || inputs_[input].weight != use.in_weight) {
      input = static_cast<int32_t>(inputs_.size());
      inputs_.push_back({use.token, use.in_weight});
    }
    use_inputs_.push_back(input);
    use_tokens_.push_back(use.token);
    use_weights_.push_back(use.out_weight);
  }
  return static_cast<int>(experts_.size()) - 1;
}

void CpuJobs::add_job(int expert, const std::byte* slice, SliceColumns columns) {
  const int64_t group = group_size(kernel_->layout().encoding);
  assert(columns.begin % group == 0 && columns.end % group == 0 && columns.begin < columns.end &&
         columns.end <= kernel_->layout().width);
  (void)group;
  const auto [first_use, uses] = experts_[expert];
  const Job job{slice, columns, first_use, uses, all_uses_, hidden_values_, cost_};
  jobs_.push_back(job);
  most_uses_ = std::max(most_uses_, uses);
  all_uses_ += uses;
  hidden_values_ += uses * columns.count();
  cost_ += row_cost(job) * columns.count();
  weight_bytes_ += kernel_->column_bytes(columns);
}

}  // namespace lighter::offload
