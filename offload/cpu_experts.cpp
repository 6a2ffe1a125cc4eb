#include "offload/cpu_experts.h"

#include <spdlog/spdlog.h>
#include <tbb/global_control.h>
#include <tbb/info.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <chrono>
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

void check_tokens(int64_t tokens, int64_t most) {
  if (tokens >= 0 && tokens <= most) return;
  throw DeviceError("the GPU posted " + std::to_string(tokens) + " tokens to a mailbox for " +
                    std::to_string(most));
}

}  // namespace

struct CpuExperts::Parts {
  // The arena's workers never leave it while they poll, so oneTBB must be free to make more threads for other
  // arenas. The least of all such settings counts, so every executor allows the same.
  Parts(int threads, int64_t prefetch_bytes)
      : more_threads(tbb::global_control::max_allowed_parallelism, kThreadsAllowed),
        team(threads, prefetch_bytes),
        arena(threads, 0) {}

  tbb::global_control more_threads;
  CpuTeam team;
  tbb::task_arena arena;
};

struct CpuExperts::Polling {
  Polling(const MissMailbox& box, MakeCpuJobs make, uint32_t step, int workers)
      : mailbox(box), make_jobs(std::move(make)), first_step(step), seen_ns(workers) {}

  // When a worker saw a layer's post: of two, since some may be at the next one while others still are at
  // this.
  struct alignas(64) Seen {
    std::atomic<int64_t> ns[2] = {0, 0};
  };
  int parity(uint32_t step, int layer) const {
    return static_cast<int>((step * static_cast<uint32_t>(mailbox.shape().layers) + layer) % 2);
  }

  const MissMailbox mailbox;
  const MakeCpuJobs make_jobs;
  const uint32_t first_step;
  std::vector<Seen> seen_ns;
};

CpuExperts::CpuExperts(const CpuExpertsOptions& options)
    : options_(options), parts_(std::make_unique<Parts>(threads_of(options), options.prefetch_bytes)) {
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

void CpuExperts::launch(std::function<void(int worker)> work, std::function<void()> on_end) {
  {
    std::lock_guard lock(mutex_);
    if (running_ > 0) throw DeviceError("the CPU's experts are busy; end what was started first");
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
  const auto& shape = mailbox.shape();
  parts_->team.reserve(shape.tokens * shape.experts_per_token * options_.expert_width);
  spans_.assign(static_cast<size_t>(shape.layers), {});
  auto polling = std::make_unique<Polling>(mailbox, std::move(make_jobs), first_step, threads());
  std::swap(polling_, polling);
  try {
    launch([this](int worker) { poll(worker); });
  } catch (...) {
    polling_ = nullptr;
    throw;
  }
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

bool CpuExperts::wait_for_post(int worker, int layer, uint32_t step, CpuJobs& expected) const {
  const MissMailbox& mailbox = polling_->mailbox;
  // What is expected of the first layer would be of a step that nobody has asked for.
  bool expects = layer == 0;
  for (uint32_t turns = 0;; spin(turns)) {
    if (step_reached(mailbox.posted(layer), step)) return true;
    if (stopping_.load(std::memory_order_relaxed) || parts_->team.abandoned()) return false;
    if (!expects && mailbox.guessed(layer) == step) {
      polling_->make_jobs(layer, mailbox.read_expected(layer), expected);
      parts_->team.expect(worker, expected);
      expects = true;
    }
    parts_->team.ask_ahead(worker);
  }
}

bool CpuExperts::was_expected(int layer, const MissPost& post) const {
  if (layer == 0 || post.tokens != 1) return false;
  const MissPost expected = polling_->mailbox.read_expected(layer);
  const int k = polling_->mailbox.shape().experts_per_token;
  return expected.step == post.step && std::is_permutation(post.experts, post.experts + k, expected.experts);
}

void CpuExperts::poll(int worker) {
  Polling& polling = *polling_;
  CpuTeam& team = parts_->team;
  CpuJobs jobs, expected_jobs;
  for (uint32_t step = polling.first_step;; ++step) {
    for (int layer = 0; layer < polling.mailbox.shape().layers; ++layer) {
      if (!wait_for_post(worker, layer, step, expected_jobs)) {
        team.abandon();  // those that have seen a later post must not wait for this one
        return;
      }
      polling.seen_ns[worker].ns[polling.parity(step, layer)].store(now_ns(), std::memory_order_relaxed);
      const MissPost post = polling.mailbox.read(layer);
      bool expected = false;
      auto outcome = CpuTeam::Outcome::abandoned;
      try {
        if (options_.on_begin) options_.on_begin(worker, step, layer);
        check_tokens(post.tokens, polling.mailbox.shape().tokens);
        polling.make_jobs(layer, post, jobs);
        // A GPU that has waited too long for a layer posts it again in the next step. Others may have listed
        // what it had posted before.
        if (const uint32_t now = polling.mailbox.posted(layer); post.step != step || now != step) {
          throw DeviceError("the GPU has gone on to step " + std::to_string(now));
        }
        expected = was_expected(layer, post);
        outcome = team.run(worker, jobs, {.quantized = post.x, .scales = post.x_scales}, post.tokens,
                           {.mailbox = &polling.mailbox, .layer = layer, .step = step}, expected);
        if (outcome == CpuTeam::Outcome::abandoned) {
          fail("the CPU's experts were stopped in the midst of " + place_of(step, layer));
          return;
        }
      } catch (const std::exception& error) {
        throw DeviceError("at " + place_of(step, layer) + ": " + error.what());
      }
      if (outcome == CpuTeam::Outcome::left_last) {
        polling.mailbox.publish_done(layer, step);
        if (!jobs.jobs().empty()) count_layer(step, layer, jobs, expected);
      }
    }
  }
}

void CpuExperts::count_layer(uint32_t step, int layer, const CpuJobs& jobs, bool expected) {
  const int64_t now = now_ns();
  int64_t seen = now, waited = 0;
  for (int worker = 0; worker < threads(); ++worker) {
    const auto& seen_ns = polling_->seen_ns[worker].ns[polling_->parity(step, layer)];
    seen = std::min(seen, seen_ns.load(std::memory_order_relaxed));
    waited += parts_->team.waited_ns(worker);
  }
  layers_.fetch_add(1, std::memory_order_relaxed);
  if (expected) expected_layers_.fetch_add(1, std::memory_order_relaxed);
  bytes_.fetch_add(jobs.weight_bytes(), std::memory_order_relaxed);
  busy_ns_.fetch_add(now - seen, std::memory_order_relaxed);
  waited_ns_.fetch_add(waited / threads(), std::memory_order_relaxed);
  spans_[static_cast<size_t>(layer)] = {layer, seen, now};
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
