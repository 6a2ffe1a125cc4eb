// A device whose copies happen when the test says so, in the order that the test says. Waits and records pass
// by themselves when it is their turn.
//
// The first copy stream that is made is number 0. Memory is that of a CpuDevice. Thread-safe.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "runtime/device/device.h"

namespace lighter::offload {

class ManualDevice : public Device {
 public:
  struct Copy {
    int stream = 0;
    std::byte* to = nullptr;
    size_t bytes = 0;
  };

  ManualDevice();
  ~ManualDevice() override;

  // Lets the stream carry out that many copies more.
  void allow(int stream, int copies = 1);
  // Lets all streams carry out everything, from now on.
  void let_go();
  // The stream's copies throw from the count-th on.
  void fail(int stream, int after_copies);

  // What was asked for and what was carried out, in order.
  std::vector<Copy> asked();
  std::vector<Copy> done();
  // Waits until that many copies were asked for; false after ten seconds.
  bool wait_for_asked(size_t copies);

  std::string name() const override { return "manual"; }
  bool is_cuda() const override { return false; }
  Stream& compute_stream() override { return memory_->compute_stream(); }
  void put(int64_t*, std::span<const int64_t>) override {}
  void hold_until(const std::atomic<uint32_t>&, uint32_t) override {}
  std::unique_ptr<Stream> new_copy_stream() override;
  std::unique_ptr<Event> new_event() override;
  double milliseconds_between(const Event&, const Event&) const override { return 1; }
  Buffer allocate(size_t bytes, const std::string& what) override { return memory_->allocate(bytes, what); }
  Buffer allocate_host(size_t bytes, const std::string& what) override {
    return memory_->allocate_host(bytes, what);
  }
  std::vector<Buffer> allocate_host_parts(std::span<const uint64_t> bytes, const std::string& what,
                                          bool near_last, const Progress& progress) override {
    return memory_->allocate_host_parts(bytes, what, near_last, progress);
  }
  MemoryBudget& device_budget() override { return memory_->device_budget(); }
  MemoryBudget& host_budget() override { return memory_->host_budget(); }
  uint64_t driver_used_bytes() const override { return memory_->driver_used_bytes(); }

 private:
  friend class ManualStream;
  friend class ManualEvent;
  struct Work {
    Copy copy;
    const std::byte* from = nullptr;
    std::shared_ptr<bool> wait_for;
    std::shared_ptr<bool> pass;
  };
  struct Queue {
    std::deque<Work> work;
    int allowed = 0;
    int copies_left = -1;  // until it fails; negative: never
  };

  void push(int stream, Work work);
  void run_all();
  bool run_one(Queue& queue);

  std::unique_ptr<Device> memory_;
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::vector<Queue> queues_;
  std::vector<Copy> asked_;
  std::vector<Copy> done_;
  bool let_go_ = false;
};

}  // namespace lighter::offload
