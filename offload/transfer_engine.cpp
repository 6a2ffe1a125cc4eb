#include "offload/transfer_engine.h"

#include <algorithm>
#include <chrono>

namespace lighter::offload {

TransferEngine::TransferEngine(Device& device, size_t piece_bytes)
    : device_(device),
      piece_bytes_(piece_bytes),
      demand_stream_(device.new_copy_stream()),
      prefetch_stream_(device.new_copy_stream()),
      busy_begin_(device.new_event()),
      busy_end_(device.new_event()),
      thread_([this] { work(); }) {}

TransferEngine::~TransferEngine() {
  {
    std::lock_guard lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void TransferEngine::fetch(const CopyRequest& request) {
  // A wait for what has passed would still cost the copy engine a moment.
  if (request.last_use != nullptr && !request.last_use->passed()) demand_stream_->wait(*request.last_use);
  if (!request.ready->passed()) demand_stream_->wait(*request.ready);
  begin_demand();
  demand_stream_->copy(request.to, request.from, request.bytes);
  end_demand(request.bytes);
  demand_stream_->record(*request.ready);
}

std::shared_ptr<PrefetchCopy> TransferEngine::prefetch(const CopyRequest& request,
                                                       std::function<void()> ended) {
  auto copy = std::make_shared<PrefetchCopy>();
  copy->request = request;
  copy->ended = std::move(ended);
  {
    std::lock_guard lock(mutex_);
    queue_.push_back(copy);
  }
  changed_.notify_all();
  return copy;
}

void TransferEngine::expedite(PrefetchCopy& copy) {
  std::lock_guard lock(copy.mutex);
  copy.taken = true;
  const CopyRequest& request = copy.request;
  const size_t rest = request.bytes - copy.issued_bytes;
  if (rest == 0) return;
  if (request.last_use != nullptr) demand_stream_->wait(*request.last_use);
  demand_stream_->wait(*request.ready);  // The pieces under way: `ready` must not pass before they have.
  begin_demand();
  demand_stream_->copy(request.to + copy.issued_bytes, request.from + copy.issued_bytes, rest);
  end_demand(rest);
  demand_stream_->record(*request.ready);
}

size_t TransferEngine::cancel(PrefetchCopy& copy) {
  std::lock_guard lock(copy.mutex);
  copy.taken = true;
  return copy.issued_bytes;
}

void TransferEngine::rethrow() {
  std::lock_guard lock(mutex_);
  if (failure_) std::rethrow_exception(failure_);
}

TransferCounters TransferEngine::counters() {
  std::lock_guard lock(demand_mutex_);
  add_busy_time();
  return counters_;
}

bool TransferEngine::demand_outstanding() {
  std::lock_guard lock(demand_mutex_);
  return !busy_end_->passed();
}

// Copies without a gap between them are one busy time.
void TransferEngine::begin_demand() {
  std::lock_guard lock(demand_mutex_);
  if (busy_recorded_ && !busy_end_->passed()) return;
  add_busy_time();
  demand_stream_->record(*busy_begin_);
  busy_recorded_ = true;
}

// Before the copy's `ready` is recorded, so that whoever has waited for that finds the time counted.
void TransferEngine::end_demand(size_t bytes) {
  std::lock_guard lock(demand_mutex_);
  demand_stream_->record(*busy_end_);
  busy_bytes_ += bytes;
  counters_.demand_bytes += bytes;
}

void TransferEngine::add_busy_time() {
  if (!busy_recorded_ || !busy_end_->passed()) return;
  counters_.demand_busy_s += device_.milliseconds_between(*busy_begin_, *busy_end_) / 1000;
  counters_.demand_busy_bytes += busy_bytes_;
  busy_bytes_ = 0;
  busy_recorded_ = false;
}

void TransferEngine::work() {
  for (;;) {
    std::shared_ptr<PrefetchCopy> next;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return ending_ || !queue_.empty(); });
      if (queue_.empty()) return;
      next = std::move(queue_.front());
      queue_.pop_front();
      if (ending_ || failure_) {
        std::lock_guard copy_lock(next->mutex);
        next->taken = true;
      }
    }
    try {
      carry_out(*next);
    } catch (...) {
      std::lock_guard lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
    next->ended();
  }
}

void TransferEngine::carry_out(PrefetchCopy& copy) {
  const CopyRequest& request = copy.request;
  for (;;) {
    while (demand_outstanding()) {
      {
        std::lock_guard lock(copy.mutex);
        if (copy.taken) return;
      }
      std::this_thread::sleep_for(std::chrono::microseconds(10));
    }
    {
      std::lock_guard lock(copy.mutex);
      if (copy.taken) return;
      if (copy.issued_bytes == 0) {
        if (request.last_use != nullptr) prefetch_stream_->wait(*request.last_use);
        prefetch_stream_->wait(*request.ready);
      }
      const size_t piece = std::min(piece_bytes_, request.bytes - copy.issued_bytes);
      prefetch_stream_->copy(request.to + copy.issued_bytes, request.from + copy.issued_bytes, piece);
      {  // Before `ready` is recorded, so that whoever sees that pass finds the piece counted.
        std::lock_guard counters_lock(demand_mutex_);
        counters_.prefetch_bytes += piece;
      }
      prefetch_stream_->record(*request.ready);
      copy.issued_bytes += piece;
      if (copy.issued_bytes == request.bytes) copy.taken = true;
    }
    prefetch_stream_->synchronize();  // One piece outstanding.
    std::lock_guard lock(copy.mutex);
    if (copy.taken) return;
  }
}

}  // namespace lighter::offload
