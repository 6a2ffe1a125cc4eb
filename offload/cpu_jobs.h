// What the CPU computes of one layer: a list of jobs, each a packed slice (or a range of its columns) in host
// memory and the tokens that chose its expert. Lists are reused: after a few layers filling one allocates
// nothing. Slices and the kernel belong to the caller. Not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "runtime/quant/cpu_slice.h"

namespace lighter::offload {

// Choices of experts in a step of several tokens in which the CPU takes part; with more of them it computes
// too slowly to be of use.
constexpr int64_t kMostSharedChoices = 512;

// A token that chose an expert: result[token] += out_weight * expert(in_weight * x[token]).
struct TokenUse {
  int32_t token = 0;
  float in_weight = 1;
  float out_weight = 1;
};

class CpuJobs {
 public:
  // A row that is quantized: weight * x[token].
  struct Input {
    int32_t token = 0;
    float weight = 1;
  };
  struct Job {
    const std::byte* slice = nullptr;
    SliceColumns columns;
    int64_t first_use = 0;  // of the arrays below
    int64_t uses = 0;
    int64_t uses_before = 0;  // of the jobs before it
    int64_t values_at = 0;    // of its hidden values [uses, columns] among those of all jobs
    int64_t cost_before = 0;
  };

  // The kernel fits all slices that follow.
  void clear(const CpuSliceKernel& kernel);
  // The tokens that chose an expert, at least one, none twice; returns what add_job() calls it.
  int add_expert(std::span<const TokenUse> uses);
  // Results are added in the order of the jobs. columns: not empty.
  void add_job(int expert, const std::byte* slice, SliceColumns columns);

  const CpuSliceKernel& kernel() const { return *kernel_; }
  const std::vector<Job>& jobs() const { return jobs_; }
  const std::vector<Input>& inputs() const { return inputs_; }
  int64_t all_uses() const { return all_uses_; }  // of all jobs
  int64_t hidden_values() const { return hidden_values_; }
  uint64_t weight_bytes() const { return weight_bytes_; }
  int64_t most_uses() const { return most_uses_; }  // of a job
  // Of a job's uses: the input, the token, and the output's weight.
  const int32_t* use_inputs(const Job& job) const { return use_inputs_.data() + job.first_use; }
  const int32_t* use_tokens(const Job& job) const { return use_tokens_.data() + job.first_use; }
  const float* use_weights(const Job& job) const { return use_weights_.data() + job.first_use; }

  // The work of the gate and up rows of all jobs, in units; a row's units are at least kUnitsOfRow.
  int64_t gate_up_work() const { return cost_; }
  // Calls body(job, begin, end) for the gate and up rows [begin, end) of each job that are the units [first,
  // last) of that work.
  template <typename Body>
  void for_gate_up(int64_t first, int64_t last, const Body& body) const {
    for (const Job& job : jobs_) {
      const int64_t begin = row_at(job, first), end = row_at(job, last);
      if (begin < end) body(job, begin, end);
    }
  }

  // Up to about so many tokens a weight costs its reading, beyond it its arithmetic.
  static constexpr int64_t kUnitsOfRow = 12;

 private:
  struct Expert {
    int64_t first_use = 0;
    int64_t uses = 0;
  };

  static int64_t row_cost(const Job& job) { return job.uses < kUnitsOfRow ? kUnitsOfRow : job.uses; }
  // The job's row where this much of all work is before; one of as many as the kernels take at a time.
  static int64_t row_at(const Job& job, int64_t cost) {
    const int64_t block = job.uses < cpu_kernels::kAmxTokens ? 4 : cpu_kernels::kRowBlock;
    const int64_t row = cost < job.cost_before ? 0 : (cost - job.cost_before) / row_cost(job) / block * block;
    return job.columns.begin + (row < job.columns.count() ? row : job.columns.count());
  }

  const CpuSliceKernel* kernel_ = nullptr;
  std::vector<Job> jobs_;
  std::vector<Input> inputs_;
  std::vector<Expert> experts_;
  std::vector<int32_t> use_inputs_;
  std::vector<int32_t> use_tokens_;
  std::vector<float> use_weights_;
  std::vector<int32_t> newest_input_;  // of each token, -1: none
  int64_t all_uses_ = 0;
  int64_t hidden_values_ = 0;
  int64_t cost_ = 0;
  int64_t most_uses_ = 0;
  uint64_t weight_bytes_ = 0;
};

}  // namespace lighter::offload
