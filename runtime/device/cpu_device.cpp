#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

#include "runtime/device/device.h"
#include "runtime/device/host_memory.h"
#include "runtime/device/near_pages.h"
#include "runtime/error.h"
#include "runtime/step_number.h"

namespace lighter {
namespace {

// One record of an event: pending until the stream has come to it.
class Mark {
 public:
  using Clock = std::chrono::steady_clock;

  void pass() {
    {
      std::lock_guard lock(mutex_);
      passed_ = true;
      at_ = Clock::now();
    }
    changed_.notify_all();
  }
  Clock::time_point at() const {
    std::lock_guard lock(mutex_);
    return at_;
  }
  bool passed() const {
    std::lock_guard lock(mutex_);
    return passed_;
  }
  void wait() const {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return passed_; });
  }

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool passed_ = false;
  Clock::time_point at_;
};

class CpuEvent : public Event {
 public:
  bool passed() const override {
    const auto latest = mark();
    return latest == nullptr || latest->passed();
  }
  void wait_on_host() const override {
    if (const auto latest = mark()) latest->wait();
  }

  std::shared_ptr<Mark> mark() const {
    std::lock_guard lock(mutex_);
    return mark_;
  }
  void move_to(std::shared_ptr<Mark> mark) {
    std::lock_guard lock(mutex_);
    mark_ = std::move(mark);
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<Mark> mark_;
};

std::shared_ptr<Mark> mark_of(const Event& event) {
  return static_cast<const CpuEvent&>(event).mark();
}

// The caller's thread is the stream: what it does is done.
class InlineStream : public Stream {
 public:
  void copy(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void wait(const Event& event) override { event.wait_on_host(); }
  void record(Event& event) override {
    auto mark = std::make_shared<Mark>();
    mark->pass();
    static_cast<CpuEvent&>(event).move_to(std::move(mark));
  }
  void synchronize() override {}
};

// A thread that carries out copies in order, as a GPU's copy engine does.
class ThreadStream : public Stream {
 public:
  ThreadStream() : worker_([this] { work(); }) {}
  ~ThreadStream() override {
    {
      std::lock_guard lock(mutex_);
      ending_ = true;
    }
    changed_.notify_all();
    worker_.join();
  }

  void copy(void* to, const void* from, size_t bytes) override { push({to, from, bytes, nullptr, nullptr}); }
  void wait(const Event& event) override {
    if (auto mark = mark_of(event)) push({nullptr, nullptr, 0, std::move(mark), nullptr});
  }
  void record(Event& event) override {
    auto mark = std::make_shared<Mark>();
    static_cast<CpuEvent&>(event).move_to(mark);
    push({nullptr, nullptr, 0, nullptr, std::move(mark)});
  }
  void synchronize() override {
    CpuEvent event;
    record(event);
    event.wait_on_host();
  }

 private:
  struct Work {
    void* to;
    const void* from;
    size_t bytes;
    std::shared_ptr<Mark> wait_for;
    std::shared_ptr<Mark> pass;
  };

  void push(Work work) {
    {
      std::lock_guard lock(mutex_);
      queue_.push_back(std::move(work));
    }
    changed_.notify_all();
  }

  // A word appears whole, and after what was copied before it, as with a GPU's copy engine.
  static void carry_out(const Work& copy) {
    if (copy.bytes == sizeof(uint32_t) && reinterpret_cast<uintptr_t>(copy.to) % sizeof(uint32_t) == 0) {
      uint32_t word;
      std::memcpy(&word, copy.from, sizeof word);
      std::atomic_ref(*static_cast<uint32_t*>(copy.to)).store(word, std::memory_order_release);
    } else if (copy.bytes > 0) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }

  void work() {
    for (;;) {
      Work next;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return ending_ || !queue_.empty(); });
        if (queue_.empty()) return;  // Ends only when all that was asked for is done.
        next = std::move(queue_.front());
        queue_.pop_front();
      }
      if (next.wait_for) next.wait_for->wait();
      carry_out(next);
      if (next.pass) next.pass->pass();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Work> queue_;
  bool ending_ = false;
  std::thread worker_;
};

class CpuDevice : public Device {
 public:
  CpuDevice(uint64_t device_budget_bytes, uint64_t host_budget_bytes)
      : device_budget_("memory.gpu_budget", device_budget_bytes),
        host_budget_("memory.host_budget", host_budget_bytes) {}

  std::string name() const override { return "cpu"; }
  bool is_cuda() const override { return false; }
  Stream& compute_stream() override { return compute_stream_; }
  void put(int64_t* to, std::span<const int64_t> values) override { std::ranges::copy(values, to); }
  void hold_until(const std::atomic<uint32_t>& word, uint32_t value) override {
    for (uint32_t now = word; !step_reached(now, value); now = word) word.wait(now);
  }
  std::unique_ptr<Stream> new_copy_stream() override { return std::make_unique<ThreadStream>(); }
  std::unique_ptr<Event> new_event() override { return std::make_unique<CpuEvent>(); }
  double milliseconds_between(const Event& begin, const Event& end) const override {
    const auto from = mark_of(begin);
    const auto to = mark_of(end);
    if (from == nullptr || to == nullptr) return 0;
    return std::chrono::duration<double, std::milli>(to->at() - from->at()).count();
  }
  Buffer allocate(size_t bytes, const std::string& what) override { return map(device_budget_, bytes, what); }
  Buffer allocate_host(size_t bytes, const std::string& what) override {
    return map(host_budget_, bytes, what);
  }
  std::vector<Buffer> allocate_host_parts(std::span<const uint64_t> bytes, const std::string& what,
                                          bool near_last, const Progress& progress) override {
    return take_host_parts(bytes, host_budget_, what, near_last, progress);
  }
  MemoryBudget& device_budget() override { return device_budget_; }
  MemoryBudget& host_budget() override { return host_budget_; }
  uint64_t driver_used_bytes() const override { return device_budget_.used_bytes(); }

 private:
  static Buffer map(MemoryBudget& budget, size_t bytes, const std::string& what) {
    if (bytes == 0) return {};
    budget.take(bytes, what);
    void* data = nullptr;
    try {
      data = map_host_memory(bytes);
    } catch (...) {
      budget.give_back(bytes);
      throw;
    }
    return Buffer(data, bytes, [bytes, &budget](void* memory) {
      unmap_host_memory(memory, bytes);
      budget.give_back(bytes);
    });
  }

  MemoryBudget device_budget_;
  MemoryBudget host_budget_;
  InlineStream compute_stream_;
};

}  // namespace

std::unique_ptr<Device> make_cpu_device(uint64_t device_budget_bytes, uint64_t host_budget_bytes) {
  return std::make_unique<CpuDevice>(device_budget_bytes, host_budget_bytes);
}

}  // namespace lighter
