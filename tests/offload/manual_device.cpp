#include "tests/offload/manual_device.h"

#include <chrono>
#include <cstring>

#include "runtime/error.h"

namespace lighter::offload {

class ManualEvent : public Event {
 public:
  explicit ManualEvent(ManualDevice& device) : device_(device) {}
  bool passed() const override {
    std::lock_guard lock(device_.mutex_);
    return passed_ == nullptr || *passed_;
  }
  void wait_on_host() const override {
    std::unique_lock lock(device_.mutex_);
    const auto passed = passed_;
    if (passed != nullptr) device_.changed_.wait(lock, [&] { return *passed; });
  }

 private:
  friend class ManualStream;
  ManualDevice& device_;
  std::shared_ptr<bool> passed_;  // guarded by the device's mutex
};

class ManualStream : public Stream {
 public:
  ManualStream(ManualDevice& device, int number) : device_(device), number_(number) {}

  void copy(void* to, const void* from, size_t bytes) override {
    device_.push(
        number_,
        {{number_, static_cast<std::byte*>(to), bytes}, static_cast<const std::byte*>(from), {}, {}});
  }
  void wait(const Event& event) override {
    std::shared_ptr<bool> passed;
    {
      std::lock_guard lock(device_.mutex_);
      passed = static_cast<const ManualEvent&>(event).passed_;
    }
    if (passed != nullptr) device_.push(number_, {{}, nullptr, std::move(passed), {}});
  }
  void record(Event& event) override {
    auto passed = std::make_shared<bool>(false);
    {
      std::lock_guard lock(device_.mutex_);
      static_cast<ManualEvent&>(event).passed_ = passed;
    }
    device_.push(number_, {{}, nullptr, {}, std::move(passed)});
  }
  void synchronize() override {
    ManualEvent event(device_);
    record(event);
    event.wait_on_host();
  }

 private:
  ManualDevice& device_;
  const int number_;
};

ManualDevice::ManualDevice() : memory_(make_cpu_device(uint64_t{1} << 30, uint64_t{1} << 30)) {}
ManualDevice::~ManualDevice() = default;

std::unique_ptr<Stream> ManualDevice::new_copy_stream() {
  std::lock_guard lock(mutex_);
  queues_.emplace_back();
  return std::make_unique<ManualStream>(*this, static_cast<int>(queues_.size()) - 1);
}

std::unique_ptr<Event> ManualDevice::new_event() {
  return std::make_unique<ManualEvent>(*this);
}

void ManualDevice::push(int stream, Work work) {
  std::lock_guard lock(mutex_);
  Queue& queue = queues_[stream];
  if (work.copy.bytes > 0) {
    if (queue.copies_left == 0) throw DeviceError("the copy engine is broken");
    if (queue.copies_left > 0) --queue.copies_left;
    asked_.push_back(work.copy);
  }
  queue.work.push_back(std::move(work));
  run_all();
}

// Called under the lock. Returns when nothing can go on.
void ManualDevice::run_all() {
  for (bool any = true; any;) {
    any = false;
    for (Queue& queue : queues_) {
      while (run_one(queue)) any = true;
    }
  }
  changed_.notify_all();
}

bool ManualDevice::run_one(Queue& queue) {
  if (queue.work.empty()) return false;
  const Work& next = queue.work.front();
  if (next.wait_for && !*next.wait_for) return false;
  if (next.copy.bytes > 0) {
    if (!let_go_ && queue.allowed == 0) return false;
    if (!let_go_) --queue.allowed;
    std::memcpy(next.copy.to, next.from, next.copy.bytes);
    done_.push_back(next.copy);
  }
  if (next.pass) *next.pass = true;
  queue.work.pop_front();
  return true;
}

void ManualDevice::allow(int stream, int copies) {
  std::lock_guard lock(mutex_);
  queues_[stream].allowed += copies;
  run_all();
}

void ManualDevice::let_go() {
  std::lock_guard lock(mutex_);
  let_go_ = true;
  run_all();
}

void ManualDevice::fail(int stream, int after_copies) {
  std::lock_guard lock(mutex_);
  queues_[stream].copies_left = after_copies;
}

std::vector<ManualDevice::Copy> ManualDevice::asked() {
  std::lock_guard lock(mutex_);
  return asked_;
}

std::vector<ManualDevice::Copy> ManualDevice::done() {
  std::lock_guard lock(mutex_);
  return done_;
}

bool ManualDevice::wait_for_asked(size_t copies) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, std::chrono::seconds(10), [&] { return asked_.size() >= copies; });
}

}  // namespace lighter::offload
