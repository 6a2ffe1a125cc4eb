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
// Before computing what another worker has begun: a quarter of what the layer has taken so far, but at least
// this. Where nobody loses its core, workers wait a few µs for one another; on virtual machines whose
// processors others use one is away for 0.3 to 90 ms some times a second.
constexpr int64_t kLeastPatienceNs = 50'000;
// Between two looks at what others have not ended.
constexpr int64_t kBetweenLooksNs = 10'000;

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

// What a worker reads for a piece.
void add_gate_up_ranges(const CpuJobs& jobs, const WorkPiece& piece, std::vector<PrefetchRange>& ranges) {
  jobs.for_gate_up(piece.begin, piece.end, [&](const CpuJobs::Job& job, int64_t begin, int64_t end) {
    jobs.kernel().add_gate_up_ranges(job.slice, begin, end, ranges);
  });
}
void add_down_ranges(const CpuJobs& jobs, const WorkPiece& piece, std::vector<PrefetchRange>& ranges) {
  for (const auto& job : jobs.jobs()) {
    ranges.push_back(
        jobs.kernel().down_range(job.slice, job.columns, piece.begin * kDownRows, piece.end * kDownRows));
  }
}

// Of a worker that began with the layer then, and has waited since then.
int64_t patience_ns(int64_t begun_ns, int64_t since_ns) {
  return std::max(kLeastPatienceNs, (since_ns - begun_ns) / 4);
}

}  // namespace

// What run() was given.
struct CpuTeam::Work {
  const CpuJobs* jobs = nullptr;
  int64_t tokens = 0;
  TeamOutput result;
  TeamLayer* layer = nullptr;
  uint64_t number = 0;  // of the layer
  TeamLayer::Claims* claims = nullptr;
  int64_t begun_ns = 0;

  TeamLayer::Hidden& hidden_of(const CpuJobs::Job& job) const {
    return layer->hidden[static_cast<size_t>(&job - jobs->jobs().data())];
  }
  bool is_ready(const CpuJobs::Job& job) const {
    return hidden_of(job).layer.load(std::memory_order_acquire) == number;
  }
};

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

  void begin(const CpuJobs& of, int workers, TeamLayer::Claims& claims) {
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
    ranges.clear();
    while (ranges.empty() && gate_up.take()) add_gate_up_ranges(*jobs, gate_up.taken.back(), ranges);
    if (ranges.empty() && !jobs->jobs().empty() && down.take()) {
      add_down_ranges(*jobs, down.taken.back(), ranges);
    }
    return ranges;
  }

  explicit Worker(int number) : index(number) {}

  const int index;
  uint64_t round = 0;             // of the inputs' barrier
  const CpuJobs* jobs = nullptr;  // of the prefetch stream
  Phase gate_up;
  Phase down;
  PrefetchStream ahead;
  int64_t asked = 0;     // of it, before run()
  bool expects = false;  // it is of expected jobs
  std::vector<PrefetchRange> ranges, ranges_again;  // of the stream; of a piece that another has begun
  QuantizedActivations input;
  std::vector<float> hidden;  // of a piece of gate and up, by job: [uses, columns]
  std::vector<float> sums;    // of a piece of down, by use: [uses of all jobs, rows]
  std::vector<float> result;  // of the same: [tokens, rows]
  Work work;
  TeamLayer* next = nullptr;  // the layer after it, if held already
  bool completed = false;  // the layer, by this worker
  bool helps = false;      // it has left the layer before that was complete
  int64_t left_ns = 0, looked_ns = 0, waiting_ns = 0;
  alignas(128) std::atomic<uint64_t> layer = 0;  // that it has come to last
  // By those who complete layers: where it was seen first, and when.
  std::atomic<uint64_t> seen_at = 0;
  std::atomic<int64_t> seen_ns = 0;
};

CpuTeam::CpuTeam(int workers, int64_t prefetch_bytes, std::function<void(int worker)> on_piece)
    : workers_(workers),
      prefetch_bytes_(prefetch_bytes),
      on_piece_(std::move(on_piece)),
      layers_(workers),
      inputs_barrier_(workers) {
  for (int i = 0; i < workers; ++i) all_.push_back(std::make_unique<Worker>(i));
}

CpuTeam::~CpuTeam() = default;

void CpuTeam::reserve(int64_t hidden_values) {
  layers_.reset(hidden_values, false);
  begin_anew();
}

void CpuTeam::reserve_for(const CpuJobs& jobs) {
  layers_.reset(jobs.hidden_values(), true);
  begin_anew();
  shares_inputs_ = jobs.inputs().size() > kRowsNotShared;
  if (!shares_inputs_) return;
  const auto& layout = jobs.kernel().layout();
  shared_input_.resize(layout.encoding, static_cast<int64_t>(jobs.inputs().size()), layout.hidden);
}

void CpuTeam::begin_anew() {
  inputs_barrier_.reset();
  for (auto& worker : all_) {
    worker->round = 0;
    worker->expects = worker->helps = false;
    worker->next = nullptr;
    worker->layer = 0;
    worker->seen_at = ~0ull;
  }
  shares_inputs_ = false;
  abandoned_ = false;
}

int64_t CpuTeam::waited_ns(int index) const {
  return all_[index]->waiting_ns;
}

int CpuTeam::missing(int index) const {
  constexpr uint64_t layers_between = 16;  // whoever looks takes the others' cache lines
  const Work& work = all_[index]->work;
  if (work.number % layers_between != 0) return -1;
  const int64_t now = now_ns();
  for (const auto& worker : all_) {
    const uint64_t at = worker->layer.load(std::memory_order_relaxed);
    if (worker->seen_at.exchange(at, std::memory_order_relaxed) != at || at >= work.number) {
      worker->seen_ns.store(now, std::memory_order_relaxed);
    } else if (now - worker->seen_ns.load(std::memory_order_relaxed) > kMostMissingMs * 1'000'000ll) {
      return worker->index;
    }
  }
  return -1;
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

// Whoever has computed a piece first hands it over.
void CpuTeam::compute_gate_up(Worker& worker, const Work& work, const WorkPiece& piece,
                              PrefetchStream& ahead) {
  const CpuJobs& jobs = *work.jobs;
  const CpuSliceKernel& kernel = jobs.kernel();
  const auto& input = shares_inputs_ ? shared_input_ : worker.input;
  size_t values = 0;
  const auto next_part = [&](const CpuJobs::Job& job, int64_t columns) {
    const size_t first = values;
    values += static_cast<size_t>(job.uses * columns);
    if (worker.hidden.size() < values) worker.hidden.resize(values);
    return worker.hidden.data() + first;
  };
  jobs.for_gate_up(piece.begin, piece.end, [&](const CpuJobs::Job& job, int64_t begin, int64_t end) {
    float* const part = next_part(job, end - begin);
    kernel.gate_up(job.slice, {input, jobs.use_inputs(job), job.uses}, begin, end, part, end - begin, ahead);
  });
  if (!work.claims->gate_up.may_hand_over(piece.number)) return;
  values = 0;
  jobs.for_gate_up(piece.begin, piece.end, [&](const CpuJobs::Job& job, int64_t begin, int64_t end) {
    const int64_t columns = job.columns.count(), here = end - begin;
    const float* const part = next_part(job, here);
    float* const all = work.layer->values.data() + job.values_at;
    for (int64_t use = 0; use < job.uses; ++use) {
      std::copy_n(part + use * here, here, all + use * columns + begin - job.columns.begin);
    }
    TeamLayer::Hidden& hidden = work.hidden_of(job);
    if (hidden.computed.fetch_add(here, std::memory_order_acq_rel) + here < columns) return;
    hidden.quantized.assign(kernel.layout().encoding, all, job.uses, columns);
    hidden.computed.store(0, std::memory_order_relaxed);
    hidden.layer.store(work.number, std::memory_order_release);
  });
}

// The same. False: the team was abandoned.
bool CpuTeam::compute_down(Worker& worker, const Work& work, const WorkPiece& piece, PrefetchStream& ahead) {
  const CpuJobs& jobs = *work.jobs;
  const int64_t first = piece.begin * kDownRows, last = piece.end * kDownRows, rows = last - first;
  worker.sums.assign(jobs.all_uses() * rows, 0.0f);
  for (const auto& job : jobs.jobs()) {
    const auto ready = [&] { return work.is_ready(job); };
    if (!ready() && !wait(worker, ready, true)) return false;
    const DownOutput out{worker.sums.data() + job.uses_before * rows, rows, nullptr, jobs.use_weights(job)};
    jobs.kernel().down(job.slice, job.columns, {work.hidden_of(job).quantized, nullptr, job.uses}, first,
                       last, out, ahead);
  }
  worker.result.assign(work.tokens * rows, 0.0f);
  for (const auto& job : jobs.jobs()) {
    for (int64_t use = 0; use < job.uses; ++use) {
      const float* from = worker.sums.data() + (job.uses_before + use) * rows;
      float* to = worker.result.data() + jobs.use_tokens(job)[use] * rows;
      for (int64_t i = 0; i < rows; ++i) to[i] += from[i];
    }
  }
  if (!work.claims->down.may_hand_over(piece.number)) return true;
  const int64_t stride = jobs.kernel().layout().hidden;
  for (int64_t token = 0; token < work.tokens; ++token) {
    write(work.result, token * stride + first, worker.result.data() + token * rows, rows);
  }
  if (work.layer->rows_done.fetch_add(rows, std::memory_order_acq_rel) + rows == stride)
    worker.completed = true;
  return true;
}

// What others have taken and not handed over, of gate and up, and then, if all hidden values are there, of
// down. since_ns: the worker has waited from then on; after long, also what somebody else computes again.
void CpuTeam::compute_again(Worker& worker, bool down_too, int64_t since_ns) {
  const Work& work = worker.work;
  const CpuJobs& jobs = *work.jobs;
  const bool anyway = now_ns() - since_ns > 4 * patience_ns(work.begun_ns, since_ns);
  const int64_t distance = jobs.kernel().prefetch_distance(jobs.most_uses(), prefetch_bytes_);
  for (const bool down : {false, true}) {
    const auto ready = [&](const CpuJobs::Job& job) { return work.is_ready(job); };
    if (down && (!down_too || !std::all_of(jobs.jobs().begin(), jobs.jobs().end(), ready))) return;
    const WorkPieces pieces = down ? down_pieces(jobs, workers_) : gate_up_pieces(jobs, workers_);
    WorkClaims& claims = down ? work.claims->down : work.claims->gate_up;
    for (int64_t number = 0; number < claims.taken(pieces); ++number) {
      const WorkPiece piece = pieces[number];
      if (piece.begin == piece.end || !claims.take_again(number, anyway)) continue;
      worker.ranges_again.clear();
      (down ? add_down_ranges : add_gate_up_ranges)(jobs, piece, worker.ranges_again);
      const PrefetchRange* const ranges = worker.ranges_again.data();
      PrefetchStream ahead(ranges, ranges + worker.ranges_again.size());
      ahead.ask_bytes(distance);
      if (down) {
        compute_down(worker, work, piece, ahead);
      } else {
        compute_gate_up(worker, work, piece, ahead);
      }
    }
  }
}

// Until ready(); meanwhile the worker asks for what it will read. helps: it is others' hidden values that are
// waited for. False: the team was abandoned before.
template <typename Ready>
bool CpuTeam::wait(Worker& worker, const Ready& ready, bool helps) {
  const int64_t began_ns = now_ns();
  int64_t asked = 0, looked_ns = began_ns;
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
      if (helps && is_time_to_help(worker, began_ns, looked_ns)) compute_again(worker, false, began_ns);
    }
  }
  worker.ahead.add_head_start(asked);
  worker.waiting_ns += now_ns() - began_ns;
  return came;
}

// since_ns: when it began to wait. looked_ns: when it looked what it can do the last time.
bool CpuTeam::is_time_to_help(const Worker& worker, int64_t since_ns, int64_t& looked_ns) {
  const int64_t now = now_ns();
  if (now - looked_ns < kBetweenLooksNs) return false;
  if (now - since_ns < patience_ns(worker.work.begun_ns, since_ns)) return false;
  looked_ns = now;
  return true;
}

// Before it is posted, because whoever holds a layer writes what others read.
void CpuTeam::hold_next(Worker& worker) {
  worker.next = layers_.hold(worker.index, worker.layer.load(std::memory_order_relaxed) + 1);
}

void CpuTeam::expect(int index, const CpuJobs& jobs) {
  Worker& worker = *all_[index];
  if (worker.next == nullptr) hold_next(worker);
  worker.expects = worker.next != nullptr;
  if (!worker.expects) return;
  worker.begin(jobs, workers_, worker.next->expected);
}

void CpuTeam::ask_ahead(int index) {
  Worker& worker = *all_[index];
  if (worker.expects && worker.asked < kMostAskedAhead) worker.ask(kAskedAtOnce);
}

bool CpuTeam::next_is_over(int index) const {
  const Worker& worker = *all_[index];
  if (worker.next != nullptr) return worker.next->complete.load(std::memory_order_seq_cst);
  return layers_.over(worker.layer.load(std::memory_order_relaxed) + 1);
}

void CpuTeam::skip(int index) {
  Worker& worker = *all_[index];
  const uint64_t number = worker.layer.load(std::memory_order_relaxed) + 1;
  worker.layer.store(number, std::memory_order_relaxed);
  worker.expects = worker.helps = false;
  layers_.release(index, number);
  hold_next(worker);
}

CpuTeam::Outcome CpuTeam::run(int index, const CpuJobs& jobs, const TeamInput& x, int64_t tokens,
                              const TeamOutput& result, bool expected) {
  Worker& worker = *all_[index];
  if (jobs.hidden_values() > layers_.hidden_values()) {
    throw CapacityError("the CPU's jobs of a layer have " + std::to_string(jobs.hidden_values()) +
                        " hidden values, and there is room for " + std::to_string(layers_.hidden_values()) +
                        "; give a larger expert width");
  }
  const uint64_t number = worker.layer.load(std::memory_order_relaxed) + 1;
  // Its place is made when the one before the last is complete.
  for (uint32_t turns = 0; worker.next == nullptr; spin(turns)) {
    hold_next(worker);
    if (worker.next != nullptr) break;
    if (layers_.over(number)) {
      skip(index);
      return Outcome::late;
    }
    if (abandoned()) return Outcome::abandoned;
  }
  TeamLayer* const layer = worker.next;
  worker.layer.store(number, std::memory_order_relaxed);
  TeamLayer::Claims& claims = expected ? layer->expected : layer->known;
  worker.work = {&jobs, tokens, result, layer, number, &claims, now_ns()};
  worker.completed = worker.helps = false;
  worker.waiting_ns = 0;
  if (expected && worker.expects) {
    worker.jobs = &jobs;
  } else {
    worker.begin(jobs, workers_, claims);
  }
  worker.expects = false;
  const int64_t distance = jobs.kernel().prefetch_distance(jobs.most_uses(), prefetch_bytes_);
  worker.ask(std::max<int64_t>(0, distance - worker.asked));
  worker.ahead.add_head_start(worker.asked - distance);

  quantize_inputs(worker, jobs, x);
  if (shares_inputs_) {
    const uint64_t round = ++worker.round;
    if (inputs_barrier_.arrive(round)) {
      inputs_barrier_.release(round);
    } else if (!wait(
                   worker, [&] { return inputs_barrier_.released(round); }, false)) {
      return Outcome::abandoned;
    }
  }
  for (WorkPiece piece; worker.gate_up.next(piece);) {
    if (claims.gate_up.is_handed_over(piece.number)) continue;
    if (on_piece_) on_piece_(index);
    compute_gate_up(worker, worker.work, piece, worker.ahead);
  }
  for (WorkPiece piece; worker.down.next(piece);) {
    if (claims.down.is_handed_over(piece.number)) continue;
    if (on_piece_) on_piece_(index);
    if (!compute_down(worker, worker.work, piece, worker.ahead)) return Outcome::abandoned;
  }
  if (result.mailbox != nullptr) result.mailbox->publish_ending(result.layer, result.step);
  if (worker.completed) {
    layers_.complete(*layer);
  } else {
    worker.helps = true;
    worker.left_ns = worker.looked_ns = now_ns();
  }
  hold_next(worker);
  return worker.completed ? Outcome::completed : Outcome::left;
}

bool CpuTeam::help(int index) {
  Worker& worker = *all_[index];
  if (!worker.helps) return false;
  if (worker.work.layer->complete.load(std::memory_order_relaxed)) {
    worker.helps = false;
    return false;
  }
  if (!is_time_to_help(worker, worker.left_ns, worker.looked_ns)) return false;
  compute_again(worker, true, worker.left_ns);
  if (!worker.completed) return false;
  worker.helps = false;
  layers_.complete(*worker.work.layer);
  return true;
}

}  // namespace lighter::offload
