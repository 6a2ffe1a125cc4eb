#include "offload/cpu_team.h"

#include <algorithm>
#include <chrono>
#include <string>

#include "runtime/error.h"

namespace lighter::offload {
namespace {

// Asked for before the input is quantized, and once more while waiting for the others: what memory delivers
// in that time.
constexpr int64_t kFirstBytes = 16384;
constexpr int64_t kBarrierBytes = 24576;
// Quantizing so many rows takes less than a barrier.
constexpr size_t kInputsNotShared = 2;

int64_t now_ns() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

// The rows of the hidden size that are worker `index`'s, in pairs.
int64_t output_row(int64_t hidden, int index, int workers) {
  return hidden / 2 * index / workers * 2;
}

}  // namespace

struct alignas(128) CpuTeam::Worker {
  uint64_t round = 0;   // of the barrier
  uint64_t layers = 0;  // run() calls
  PrefetchStream ahead;
  std::vector<PrefetchRange> ranges;
  std::vector<float> scaled;  // a row of x times its weight
  QuantizedActivations input;
  QuantizedActivations hidden;
  std::vector<float> sums;  // [tokens, its rows]
  std::atomic<int64_t> waited_ns = 0;
};

CpuTeam::CpuTeam(int workers) : workers_(workers), barrier_(workers) {
  for (int i = 0; i < workers; ++i) all_.push_back(std::make_unique<Worker>());
}

CpuTeam::~CpuTeam() = default;

void CpuTeam::reserve(int64_t hidden_values) {
  for (auto& values : values_) {
    if (static_cast<int64_t>(values.size()) < hidden_values) values.resize(hidden_values);
  }
  shares_input_ = false;
  // After an abandoned run the counts are no longer whole rounds.
  abandoned_ = false;
  barrier_.reset();
  for (auto& worker : all_) worker->round = worker->layers = 0;
}

void CpuTeam::reserve_for(const CpuJobs& jobs) {
  reserve(jobs.hidden_values());
  shares_input_ = jobs.inputs().size() > kInputsNotShared;
  if (!shares_input_) return;
  const auto& layout = jobs.kernel().layout();
  shared_input_.resize(layout.encoding, static_cast<int64_t>(jobs.inputs().size()), layout.hidden);
}

int64_t CpuTeam::waited_ns(int index) const {
  return all_[index]->waited_ns.load(std::memory_order_relaxed);
}

void CpuTeam::quantize_inputs(Worker& worker, int index, const CpuJobs& jobs, const float* x) {
  const auto& layout = jobs.kernel().layout();
  const auto& inputs = jobs.inputs();
  auto& rows = shares_input_ ? shared_input_ : worker.input;
  if (!shares_input_) rows.resize(layout.encoding, static_cast<int64_t>(inputs.size()), layout.hidden);
  const size_t step = shares_input_ ? workers_ : 1;
  for (size_t i = shares_input_ ? index : 0; i < inputs.size(); i += step) {
    const float* row = x + inputs[i].token * layout.hidden;
    if (inputs[i].weight != 1) {
      worker.scaled.resize(layout.hidden);
      std::transform(row, row + layout.hidden, worker.scaled.begin(),
                     [weight = inputs[i].weight](float value) { return value * weight; });
      row = worker.scaled.data();
    }
    rows.assign_row(static_cast<int64_t>(i), row);
  }
}

bool CpuTeam::pass_barrier(Worker& worker) {
  const uint64_t round = ++worker.round;
  if (barrier_.arrive(round)) {
    barrier_.release(round);
    return true;
  }
  uint32_t turns = 0;
  for (int64_t asked = 0; !barrier_.released(round);) {
    // Somebody who left after this round has released it before.
    if (abandoned()) return barrier_.released(round);
    if (asked < kBarrierBytes) {
      worker.ahead.ask_bytes(256);
      asked += 256;
    } else {
      spin(turns);
    }
  }
  return true;
}

bool CpuTeam::run(int index, const CpuJobs& jobs, const float* x, int64_t tokens, float* result) {
  Worker& worker = *all_[index];
  const CpuSliceKernel& kernel = jobs.kernel();
  const auto& layout = kernel.layout();
  auto& values = values_[worker.layers++ % 2];
  if (static_cast<int64_t>(values.size()) < jobs.hidden_values()) {
    throw CapacityError("the CPU's jobs of a layer have " + std::to_string(jobs.hidden_values()) +
                        " hidden values, and there is room for " + std::to_string(values.size()) +
                        "; give a larger expert width");
  }
  const int64_t first = output_row(layout.hidden, index, workers_);
  const int64_t last = output_row(layout.hidden, index + 1, workers_);

  worker.ranges.clear();
  jobs.for_share(index, workers_, [&](const CpuJobs::Job& job, int64_t begin, int64_t end) {
    kernel.add_gate_up_ranges(job.slice, begin, end, worker.ranges);
  });
  for (const auto& job : jobs.jobs()) {
    worker.ranges.push_back(kernel.down_range(job.slice, job.columns, first, last));
  }
  worker.ahead = PrefetchStream(worker.ranges.data(), worker.ranges.data() + worker.ranges.size());
  worker.ahead.ask_bytes(kFirstBytes);

  quantize_inputs(worker, index, jobs, x);
  if (shares_input_ && !pass_barrier(worker)) return false;
  const auto& input = shares_input_ ? shared_input_ : worker.input;
  jobs.for_share(index, workers_, [&](const CpuJobs::Job& job, int64_t begin, int64_t end) {
    float* to = values.data() + job.values_at + begin - job.columns.begin;
    kernel.gate_up(job.slice, {input, jobs.use_inputs(job), job.uses}, begin, end, to, job.columns.count(),
                   worker.ahead);
  });

  const int64_t arrived_ns = now_ns();
  if (!pass_barrier(worker)) return false;
  worker.waited_ns.store(now_ns() - arrived_ns, std::memory_order_relaxed);

  const int64_t rows = last - first;
  worker.sums.assign(tokens * rows, 0.0f);
  for (const auto& job : jobs.jobs()) {
    worker.hidden.assign(layout.encoding, values.data() + job.values_at, job.uses, job.columns.count());
    const DownOutput out{worker.sums.data(), rows, jobs.use_tokens(job), jobs.use_weights(job)};
    kernel.down(job.slice, job.columns, {worker.hidden, nullptr, job.uses}, first, last, out, worker.ahead);
  }
  for (int64_t token = 0; token < tokens; ++token) {
    const float* from = worker.sums.data() + token * rows;
    std::copy(from, from + rows, result + token * layout.hidden + first);
  }
  return true;
}

}  // namespace lighter::offload
