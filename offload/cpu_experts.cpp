#include "offload/cpu_experts.h"

#include <spdlog/spdlog.h>
#include <tbb/global_control.h>
#include <tbb/info.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <thread>
#include <utility>
#include <vector>

#include "offload/cpu_team.h"
#include "runtime/error.h"

namespace lighter::offload {
namespace {

constexpr auto kTimeToWake = std::chrono::seconds(10);
constexpr auto kTimeToEnd = std::chrono::seconds(1);
constexpr size_t kThreadsAllowed = 256;  // of the process; only those that are needed are made

int64_t now_ns() {
  return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

int threads_of(const CpuExpertsOptions& options) {
  const int threads =
      options.threads > 0 ? options.threads : std::max(1, tbb::info::default_concurrency() - 1);
  if (threads <= CpuExperts::kMostThreads) return threads;
  throw ConfigError("the CPU's experts cannot have " + std::to_string(threads) + " threads; at most " +
                    std::to_string(CpuExperts::kMostThreads));
}

// As long as it lives the worker looks something up. Sequentially consistent with CpuTeam::next_is_over():
// after a layer was seen to be over no worker does so for it.
class Looking {
 public:
  explicit Looking(std::atomic<bool>& flag) : flag_(flag) { flag_.store(true, std::memory_order_seq_cst); }
  ~Looking() { flag_.store(false, std::memory_order_release); }
  Looking(const Looking&) = delete;
  Looking& operator=(const Looking&) = delete;

 private:
  std::atomic<bool>& flag_;
};

void check_tokens(int64_t tokens, int64_t most) {
  if (tokens >= 0 && tokens <= most) return;
  throw DeviceError("the GPU posted " + std::to_string(tokens) + " tokens to a mailbox for " +
                    std::to_string(most));
}

}  // namespace

struct CpuExperts::Parts {
  // The arena's workers never leave it while they poll, so oneTBB must be free to make more threads for other
  // arenas. The least of all such settings counts, so every executor allows the same.
  Parts(int threads, const CpuExpertsOptions& options)
      : more_threads(tbb::global_control::max_allowed_parallelism, kThreadsAllowed),
        team(threads, options.prefetch_bytes, options.on_piece),
        arena(threads, 0) {}

  tbb::global_control more_threads;
  CpuTeam team;
  tbb::task_arena arena;
};

struct CpuExperts::Polling {
  Polling(const MissMailbox& box, MakeCpuJobs make, uint32_t step, int workers)
      : mailbox(box), make_jobs(std::move(make)), first_step(step), workers(workers) {}

  struct alignas(64) Worker {
    std::atomic<bool> looks = false;  // something up: what is posted, and what make_jobs() refers to
    CpuJobs jobs, expected_jobs;
    uint32_t step = 0;  // that it has left last, and the layer
    int layer = 0;
    bool expected = false;
    int64_t seen_ns = 0;  // when it saw the layer's post
  };

  const MissMailbox mailbox;
  const MakeCpuJobs make_jobs;
  const uint32_t first_step;
  std::deque<Worker> workers;
};

CpuExperts::CpuExperts(const CpuExpertsOptions& options)
    : options_(options), parts_(std::make_unique<Parts>(threads_of(options), options)) {
  const auto allowed = tbb::global_control::active_value(tbb::global_control::max_allowed_parallelism);
  if (allowed > static_cast<size_t>(threads())) return;
  throw ConfigError("oneTBB is held to " + std::to_string(allowed) + " threads, but the CPU's experts need " +
                    std::to_string(threads()) + " beside the caller's; use fewer");
}

CpuExperts::~CpuExperts() {
  stopping_ = true;
  if (polling_ != nullptr) parts_->team.abandon();
  await_workers();
  if (!failure_.empty()) spdlog::error("{}", failure_);
}

int CpuExperts::threads() const {
  return parts_->team.workers();
}

void CpuExperts::check_idle() {
  std::lock_guard lock(mutex_);
  if (running_ > 0) throw DeviceError("the CPU's experts are busy; end what was started first");
}

void CpuExperts::launch(std::function<void(int worker)> work, std::function<void()> on_end) {
  {
    std::lock_guard lock(mutex_);
    running_ = threads();
    on_end_ = std::move(on_end);
    failure_.clear();
  }
  stopping_ = false;
  awake_ = 0;
  const auto shared = std::make_shared<const std::function<void(int)>>(std::move(work));
  for (int worker = 0; worker < threads(); ++worker) {
    parts_->arena.enqueue([this, worker, shared] {
      try {
        ++awake_;
        (*shared)(worker);
      } catch (const std::exception& error) {
        fail("worker " + std::to_string(worker) + " of the CPU's experts failed: " + error.what());
      } catch (...) {
        fail("worker " + std::to_string(worker) + " of the CPU's experts failed");
      }
      std::lock_guard lock(mutex_);
      if (running_ == 1 && on_end_) on_end_();
      if (--running_ == 0) ended_.notify_all();
    });
  }
}

void CpuExperts::fail(const std::string& what) {
  {
    std::lock_guard lock(mutex_);
    if (failure_.empty()) failure_ = what;
  }
  parts_->team.abandon();
}

void CpuExperts::await_workers() {
  std::unique_lock lock(mutex_);
  ended_.wait(lock, [&] { return running_ == 0; });
}

void CpuExperts::rethrow() {
  std::lock_guard lock(mutex_);
  if (!failure_.empty()) throw DeviceError(std::exchange(failure_, {}));
}

void CpuExperts::start(const CpuJobs& jobs, const float* x, int64_t tokens, float* result,
                       std::function<void()> on_end) {
  if (polling_ != nullptr) throw DeviceError("the CPU's experts are polling; stop_polling() first");
  check_idle();
  parts_->team.reserve_for(jobs);
  const auto work = [this, &jobs, x, tokens, result](int worker) {
    if (options_.on_begin) options_.on_begin(worker, 0, 0);
    parts_->team.run(worker, jobs, {.x = x}, tokens, {.sums = result});
  };
  launch(work, std::move(on_end));
}

void CpuExperts::wait() {
  await_workers();
  rethrow();
}

void CpuExperts::run(const CpuJobs& jobs, const float* x, int64_t tokens, float* result) {
  start(jobs, x, tokens, result);
  wait();
}

void CpuExperts::start_polling(const MissMailbox& mailbox, MakeCpuJobs make_jobs, uint32_t first_step) {
  if (polling_ != nullptr) throw DeviceError("the CPU's experts are polling already");
  check_idle();
  const auto& shape = mailbox.shape();
  parts_->team.reserve(shape.tokens * shape.experts_per_token * options_.expert_width);
  spans_.assign(static_cast<size_t>(shape.layers), {});
  auto polling = std::make_unique<Polling>(mailbox, std::move(make_jobs), first_step, threads());
  std::swap(polling_, polling);
  launch([this](int worker) { poll(worker); });
  const auto deadline = std::chrono::steady_clock::now() + kTimeToWake;
  while (awake_ < threads()) {
    if (std::chrono::steady_clock::now() > deadline) {
      const int awake = awake_;
      stop_polling();
      throw DeviceError("only " + std::to_string(awake) + " of " + std::to_string(threads()) +
                        " workers of the CPU's experts came; use fewer threads");
    }
    std::this_thread::yield();
  }
}

void CpuExperts::stop_polling() {
  if (polling_ == nullptr) return;
  stopping_ = true;
  std::unique_lock lock(mutex_);
  if (!ended_.wait_for(lock, kTimeToEnd, [&] { return running_ == 0; })) {
    parts_->team.abandon();
    throw DeviceError(std::to_string(running_) + " of " + std::to_string(threads()) +
                      " workers of the CPU's experts have not ended within a second" +
                      (failure_.empty() ? "" : "; " + failure_));
  }
  lock.unlock();
  polling_ = nullptr;
  rethrow();
}

bool CpuExperts::idle() const {
  return std::none_of(polling_->workers.begin(), polling_->workers.end(), [](const Polling::Worker& worker) {
    return worker.looks.load(std::memory_order_seq_cst);
  });
}

// False: there is nothing more to come.
bool CpuExperts::wait_for_post(int index, int layer, uint32_t step) {
  const MissMailbox& mailbox = polling_->mailbox;
  CpuTeam& team = parts_->team;
  Polling::Worker& worker = polling_->workers[index];
  // What is expected of the first layer would be of a step that nobody has asked for.
  bool expects = layer == 0;
  for (uint32_t turns = 0;; spin(turns)) {
    if (team.abandoned()) return false;
    if (step_reached(mailbox.posted(layer), step)) return true;
    if (stopping_.load(std::memory_order_relaxed)) return false;
    if (team.help(index)) end_layer(index);
    if (!expects && mailbox.guessed(layer) == step) {
      expects = true;
      const Looking looking(worker.looks);
      if (team.next_is_over(index)) continue;
      polling_->make_jobs(layer, mailbox.read_expected(layer), worker.expected_jobs);
      if (team.next_is_over(index)) continue;
      team.expect(index, worker.expected_jobs);
    }
    team.ask_ahead(index);
  }
}

bool CpuExperts::was_expected(int layer, const MissPost& post) const {
  if (layer == 0 || post.tokens != 1) return false;
  const MissPost expected = polling_->mailbox.read_expected(layer);
  const int k = polling_->mailbox.shape().experts_per_token;
  return expected.step == post.step && std::is_permutation(post.experts, post.experts + k, expected.experts);
}

void CpuExperts::poll(int worker) {
  for (uint32_t step = polling_->first_step;; ++step) {
    for (int layer = 0; layer < polling_->mailbox.shape().layers; ++layer) {
      if (!wait_for_post(worker, layer, step)) {
        parts_->team.abandon();  // those that have seen a later post must not wait for this one
        return;
      }
      try {
        if (!serve(worker, layer, step)) return;
      } catch (const std::exception& error) {
        throw DeviceError("at " + place_of(step, layer) + ": " + error.what());
      }
    }
  }
}

// A worker comes here late, too, when the others have done the layer, and the GPU may be writing what belongs
// to later steps. As long as the layer is not done nothing changes of what is looked up. False: the team was
// abandoned.
bool CpuExperts::serve(int index, int layer, uint32_t step) {
  const MissMailbox& mailbox = polling_->mailbox;
  CpuTeam& team = parts_->team;
  Polling::Worker& worker = polling_->workers[index];
  if (options_.on_begin) options_.on_begin(index, step, layer);
  worker.seen_ns = now_ns();
  const Looking looking(worker.looks);
  const auto is_late = [&] {
    if (!team.next_is_over(index)) return false;
    team.skip(index);
    return true;
  };
  if (is_late()) return true;
  const MissPost post = mailbox.read(layer);
  check_tokens(post.tokens, mailbox.shape().tokens);
  polling_->make_jobs(layer, post, worker.jobs);
  // A GPU that has waited too long for a layer posts it again in the next step. Others may have listed what
  // it had posted before.
  if (const uint32_t now = mailbox.posted(layer); post.step != step || now != step) {
    if (is_late()) return true;
    throw DeviceError("the GPU has gone on to step " + std::to_string(now));
  }
  worker.step = step;
  worker.layer = layer;
  worker.expected = was_expected(layer, post);
  if (is_late()) return true;  // or else all that has been looked up is right
  const auto outcome =
      team.run(index, worker.jobs, {.quantized = post.x, .scales = post.x_scales}, post.tokens,
               {.mailbox = &mailbox, .layer = layer, .step = step}, worker.expected);
  if (outcome == CpuTeam::Outcome::late) return true;
  if (outcome == CpuTeam::Outcome::abandoned) {
    fail("the CPU's experts were stopped in the midst of " + place_of(step, layer));
    return false;
  }
  if (outcome == CpuTeam::Outcome::completed) end_layer(index);
  if (!worker.jobs.jobs().empty()) {
    waited_ns_.fetch_add(team.waited_ns(index) / threads(), std::memory_order_relaxed);
  }
  return true;
}

// By the worker who has completed the layer that it has left last.
void CpuExperts::end_layer(int index) {
  const CpuTeam& team = parts_->team;
  const Polling::Worker& worker = polling_->workers[index];
  const int64_t now = now_ns();
  polling_->mailbox.publish_done(worker.layer, worker.step);
  if (const int missing = team.missing(index); missing >= 0) {
    throw DeviceError("worker " + std::to_string(missing) + " has not come for " +
                      std::to_string(CpuTeam::kMostMissingMs) + " ms; it has died or is starved of its core");
  }
  if (worker.jobs.jobs().empty()) return;
  layers_.fetch_add(1, std::memory_order_relaxed);
  if (worker.expected) expected_layers_.fetch_add(1, std::memory_order_relaxed);
  bytes_.fetch_add(worker.jobs.weight_bytes(), std::memory_order_relaxed);
  busy_ns_.fetch_add(now - worker.seen_ns, std::memory_order_relaxed);
  const std::unique_lock lock(mutex_, std::try_to_lock);  // one that has lost its core may have it
  if (lock) spans_[static_cast<size_t>(worker.layer)] = {worker.layer, worker.seen_ns, now};
}

std::vector<MissSpan> CpuExperts::latest_spans() const {
  std::vector<MissSpan> spans = spans_;
  std::erase_if(spans, [](const MissSpan& span) { return span.end_ns == 0; });
  return spans;
}

CpuExpertsCounters CpuExperts::counters() const {
  return {layers_.load(std::memory_order_relaxed), expected_layers_.load(std::memory_order_relaxed),
          bytes_.load(std::memory_order_relaxed),
          static_cast<double>(busy_ns_.load(std::memory_order_relaxed)) * 1e-9,
          static_cast<double>(waited_ns_.load(std::memory_order_relaxed)) * 1e-9};
}

}  // namespace lighter::offload
