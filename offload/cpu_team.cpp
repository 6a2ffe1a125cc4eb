#include "offload/cpu_team.h"

#include <algorithm>
#include <chrono>
#include <span>
#include <string>

#include "runtime/error.h"

namespace lighter::offload {
namespace {

// Asked for while waiting for others, at most, each time: what memory delivers meanwhile.
constexpr int64_t kMostWhileWaiting = 24 << 10;
// Of expected jobs: up to so much for each worker, which stays in its second-level cache, and so much between
// two looks at whether they have come. While an H100 works before a layer's routing, memory delivers some 200
// KB a worker; two to four times as much gains nothing where layers without misses leave more time.
constexpr int64_t kMostAskedAhead = 384 << 10;
constexpr int64_t kAskedAtOnce = 512;
// Quantizing so many rows of x takes less than a barrier.
constexpr size_t kRowsNotShared = 2;
// The smallest pieces of work: some µs of reading.
constexpr int64_t kPieceBytes = 32768;
// Output rows of a piece come in blocks of so many.
constexpr int64_t kDownRows = cpu_kernels::kRowBlock;

int64_t now_ns() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

// In the units of CpuJobs::gate_up_work().
WorkPieces gate_up_pieces(const CpuJobs& jobs, int workers) {
  const auto& layout = jobs.kernel().layout();
  const int64_t row = 2 * value_bytes(layout.encoding, layout.hidden);
  const int64_t least = jobs.most_uses() < cpu_kernels::kAmxTokens ? 1 : 2 * cpu_kernels::kRowBlock;
  const int64_t rows = std::max(least, kPieceBytes / row);
  return {jobs.gate_up_work(), rows * CpuJobs::kUnitsOfRow, workers};
}

// `count` values from place `at` on.
void write(const TeamOutput& to, int64_t at, const float* values, int64_t count) {
  if (to.mailbox != nullptr) {
    to.mailbox->write_result(to.layer, to.step, at, values, count);
  } else {
    std::copy_n(values, count, to.sums + at);
  }
}

// In blocks of kDownRows output rows.
WorkPieces down_pieces(const CpuJobs& jobs, int workers) {
  const auto& layout = jobs.kernel().layout();
  int64_t columns = 0;
  for (const auto& job : jobs.jobs()) columns += job.columns.count();
  const int64_t block = std::max<int64_t>(1, kDownRows * value_bytes(layout.encoding, columns));
  return {layout.hidden / kDownRows, std::max<int64_t>(1, kPieceBytes / block), workers};
}

}  // namespace

// What the worker takes it takes through its prefetch stream, which runs ahead of the computation.
struct alignas(128) CpuTeam::Worker : PrefetchSource {
  // The pieces of one phase, of which some are taken and not yet computed.
  struct Phase {
    WorkPieces pieces;
    WorkClaims* claims = nullptr;
    std::vector<WorkPiece> taken;
    size_t computed = 0;

    void begin(const WorkPieces& all, WorkClaims& from) {
      pieces = all;
      claims = &from;
      taken.clear();
      computed = 0;
    }
    bool take() {
      WorkPiece piece;
      if (!claims->take(pieces, piece)) return false;
      taken.push_back(piece);
      return true;
    }
    // The next to compute. A piece that was not prefetched is taken here.
    bool next(WorkPiece& piece) {
      if (computed == taken.size() && !take()) return false;
      piece = taken[computed++];
      return true;
    }
  };

  void begin(const CpuJobs& of, int workers, Layer::Claims& claims) {
    jobs = &of;
    gate_up.begin(gate_up_pieces(of, workers), claims.gate_up);
    down.begin(down_pieces(of, workers), claims.down);
    ahead = PrefetchStream(*this);
    asked = 0;
  }
  void ask(int64_t bytes) {
    ahead.ask_bytes(bytes);
    asked += bytes;
  }

  std::span<const PrefetchRange> more() override {
    const CpuSliceKernel& kernel = jobs->kernel();
    ranges.clear();
    while (ranges.empty() && gate_up.take()) {
      const WorkPiece piece = gate_up.taken.back();
      jobs->for_gate_up(piece.begin, piece.end, [&](const CpuJobs::Job& job, int64_t begin, int64_t end) {
        kernel.add_gate_up_ranges(job.slice, begin, end, ranges);
      });
    }
    if (!ranges.empty() || jobs->jobs().empty() || !down.take()) return ranges;
    const WorkPiece piece = down.taken.back();
    for (const auto& job : jobs->jobs()) {
      ranges.push_back(
          kernel.down_range(job.slice, job.columns, piece.begin * kDownRows, piece.end * kDownRows));
    }
    return ranges;
  }

  explicit Worker(int number) : index(number) {}

  const int index;
  uint64_t round = 0;   // of the inputs' barrier
  uint64_t layers = 0;  // run() calls
  const CpuJobs* jobs = nullptr;
  Phase gate_up;
  Phase down;
  PrefetchStream ahead;
  int64_t asked = 0;     // of it, before run()
  bool expects = false;  // it is of expected jobs
  std::vector<PrefetchRange> ranges;
  QuantizedActivations input;
  std::vector<float> sums;    // of a piece of down, by use: [uses of all jobs, rows]
  std::vector<float> result;  // of the same: [tokens, rows]
  int64_t waiting_ns = 0;     // of the run() under way
  std::atomic<int64_t> waited_ns = 0;
};

CpuTeam::CpuTeam(int workers, int64_t prefetch_bytes)
    : workers_(workers), prefetch_bytes_(prefetch_bytes), inputs_barrier_(workers), layer_barrier_(workers) {
  for (int i = 0; i < workers; ++i) all_.push_back(std::make_unique<Worker>(i));
}

CpuTeam::~CpuTeam() = default;

void CpuTeam::reserve(int64_t hidden_values) {
  constexpr int64_t fewest = group_size(SliceEncoding::int4);  // of a job
  for (auto& layer : layers_) {
    if (static_cast<int64_t>(layer.values.size()) < hidden_values) {
      layer.values.resize(hidden_values);
      layer.hidden.resize(static_cast<size_t>(hidden_values / fewest));
    }
  }
  shares_inputs_ = false;
  if (!abandoned_) return;
  // An abandoned run leaves counts that are no whole rounds.
  for (auto& layer : layers_) {
    layer.reset();
    for (Hidden& hidden : layer.hidden) {
      hidden.computed.store(0, std::memory_order_relaxed);
      hidden.layer.store(0, std::memory_order_relaxed);
    }
  }
  inputs_barrier_.reset();
  layer_barrier_.reset();
  for (auto& worker : all_) {
    worker->round = worker->layers = 0;
    worker->expects = false;
  }
  abandoned_ = false;
}

void CpuTeam::reserve_for(const CpuJobs& jobs) {
  reserve(jobs.hidden_values());
  shares_inputs_ = jobs.inputs().size() > kRowsNotShared;
  if (!shares_inputs_) return;
  const auto& layout = jobs.kernel().layout();
  shared_input_.resize(layout.encoding, static_cast<int64_t>(jobs.inputs().size()), layout.hidden);
}

int64_t CpuTeam::waited_ns(int index) const {
  return all_[index]->waited_ns.load(std::memory_order_relaxed);
}

void CpuTeam::quantize_inputs(Worker& worker, const CpuJobs& jobs, const TeamInput& x) {
  if (jobs.jobs().empty()) return;
  const auto& layout = jobs.kernel().layout();
  const auto& inputs = jobs.inputs();
  auto& rows = shares_inputs_ ? shared_input_ : worker.input;
  if (!shares_inputs_) rows.resize(layout.encoding, static_cast<int64_t>(inputs.size()), layout.hidden);
  const size_t step = shares_inputs_ ? workers_ : 1;
  for (size_t i = shares_inputs_ ? worker.index : 0; i < inputs.size(); i += step) {
    const auto row = static_cast<int64_t>(i), token = int64_t{inputs[i].token};
    if (x.x != nullptr) {
      rows.assign_row(row, x.x + token * layout.hidden, inputs[i].weight);
    } else {
      rows.assign_quantized_row(row, x.quantized + token * layout.hidden, x.scales + token * rows.groups(),
                                inputs[i].weight);
    }
  }
}

void CpuTeam::compute_gate_up(Worker& worker, const CpuJobs& jobs, WorkPiece piece, Layer& layer) {
  const CpuSliceKernel& kernel = jobs.kernel();
  const auto& input = shares_inputs_ ? shared_input_ : worker.input;
  jobs.for_gate_up(piece.begin, piece.end, [&](const CpuJobs::Job& job, int64_t begin, int64_t end) {
    float* const values = layer.values.data() + job.values_at;
    const int64_t columns = job.columns.count();
    kernel.gate_up(job.slice, {input, jobs.use_inputs(job), job.uses}, begin, end,
                   values + begin - job.columns.begin, columns, worker.ahead);
    Hidden& hidden = layer.hidden_of(jobs, job);
    if (hidden.computed.fetch_add(end - begin, std::memory_order_acq_rel) + end - begin < columns) return;
    hidden.quantized.assign(kernel.layout().encoding, values, job.uses, columns);
    hidden.computed.store(0, std::memory_order_relaxed);
    hidden.layer.store(worker.layers, std::memory_order_release);
  });
}

// False: the team was abandoned.
bool CpuTeam::compute_down(Worker& worker, const CpuJobs& jobs, WorkPiece piece, int64_t tokens,
                           const TeamOutput& result, Layer& layer) {
  const int64_t first = piece.begin * kDownRows, last = piece.end * kDownRows, rows = last - first;
  worker.sums.assign(jobs.all_uses() * rows, 0.0f);
  for (const auto& job : jobs.jobs()) {
    const Hidden& hidden = layer.hidden_of(jobs, job);
    const auto ready = [&] { return hidden.layer.load(std::memory_order_acquire) == worker.layers; };
    if (!ready() && !wait(worker, ready)) return false;
    const DownOutput out{worker.sums.data() + job.uses_before * rows, rows, nullptr, jobs.use_weights(job)};
    jobs.kernel().down(job.slice, job.columns, {hidden.quantized, nullptr, job.uses}, first, last, out,
                       worker.ahead);
  }
  worker.result.assign(tokens * rows, 0.0f);
  for (const auto& job : jobs.jobs()) {
    for (int64_t use = 0; use < job.uses; ++use) {
      const float* from = worker.sums.data() + (job.uses_before + use) * rows;
      float* to = worker.result.data() + jobs.use_tokens(job)[use] * rows;
      for (int64_t i = 0; i < rows; ++i) to[i] += from[i];
    }
  }
  const int64_t stride = jobs.kernel().layout().hidden;
  for (int64_t token = 0; token < tokens; ++token) {
    write(result, token * stride + first, worker.result.data() + token * rows, rows);
  }
  return true;
}

// Until ready(); meanwhile the worker asks for what it will read. False: the team was abandoned before.
template <typename Ready>
bool CpuTeam::wait(Worker& worker, const Ready& ready) {
  const int64_t began_ns = now_ns();
  int64_t asked = 0;
  uint32_t turns = 0;
  bool came = false;
  while (!(came = ready())) {
    if (abandoned()) {
      came = ready();  // somebody who left after it made it so before
      break;
    }
    if (asked < kMostWhileWaiting) {
      worker.ahead.ask_bytes(256);
      asked += 256;
    } else {
      spin(turns);
    }
  }
  worker.ahead.add_head_start(asked);
  worker.waiting_ns += now_ns() - began_ns;
  return came;
}

void CpuTeam::expect(int index, const CpuJobs& jobs) {
  Worker& worker = *all_[index];
  worker.begin(jobs, workers_, layers_[(worker.layers + 1) % 2].expected);
  worker.expects = true;
}

void CpuTeam::ask_ahead(int index) {
  Worker& worker = *all_[index];
  if (worker.expects && worker.asked < kMostAskedAhead) worker.ask(kAskedAtOnce);
}

CpuTeam::Outcome CpuTeam::run(int index, const CpuJobs& jobs, const TeamInput& x, int64_t tokens,
                              const TeamOutput& result, bool expected) {
  Worker& worker = *all_[index];
  // A GPU posts a layer when it has the result of the one before, which some worker without a part in it may
  // not have left.
  for (uint32_t turns = 0; !layer_barrier_.released(worker.layers); spin(turns)) {
    if (abandoned() && !layer_barrier_.released(worker.layers)) return Outcome::abandoned;
  }
  Layer& layer = layers_[++worker.layers % 2];
  if (static_cast<int64_t>(layer.values.size()) < jobs.hidden_values()) {
    throw CapacityError("the CPU's jobs of a layer have " + std::to_string(jobs.hidden_values()) +
                        " hidden values, and there is room for " + std::to_string(layer.values.size()) +
                        "; give a larger expert width");
  }
  if (expected && worker.expects) {
    worker.jobs = &jobs;
  } else {
    worker.begin(jobs, workers_, expected ? layer.expected : layer.known);
  }
  worker.expects = false;
  worker.waiting_ns = 0;
  const int64_t distance = jobs.kernel().prefetch_distance(jobs.most_uses(), prefetch_bytes_);
  worker.ask(std::max<int64_t>(0, distance - worker.asked));
  worker.ahead.add_head_start(worker.asked - distance);

  quantize_inputs(worker, jobs, x);
  if (shares_inputs_) {
    const uint64_t round = ++worker.round;
    if (inputs_barrier_.arrive(round)) {
      inputs_barrier_.release(round);
    } else if (!wait(worker, [&] { return inputs_barrier_.released(round); })) {
      return Outcome::abandoned;
    }
  }
  for (WorkPiece piece; worker.gate_up.next(piece);) compute_gate_up(worker, jobs, piece, layer);
  for (WorkPiece piece; worker.down.next(piece);) {
    if (!compute_down(worker, jobs, piece, tokens, result, layer)) return Outcome::abandoned;
  }
  if (result.mailbox != nullptr) result.mailbox->publish_ending(result.layer, result.step);
  worker.waited_ns.store(worker.waiting_ns, std::memory_order_relaxed);
  if (!layer_barrier_.arrive(worker.layers)) return Outcome::left;
  layer.reset();
  layer_barrier_.release(worker.layers);
  return Outcome::left_last;
}

}  // namespace lighter::offload
