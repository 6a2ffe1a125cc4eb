// The device a model computes on, without libtorch: memory under a budget, streams and events.
//
// Two implementations: CudaDevice, and CpuDevice, whose "device memory" is a bounded part of host memory
// and whose streams are threads, so that every path (paging, eviction, prefetch) also runs without a GPU.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "runtime/memory/memory_budget.h"
#include "runtime/progress.h"

namespace lighter {

// A marker in a stream. Recording it again moves it; a wait refers to the latest record before the wait.
// An event that was never recorded counts as passed. Thread-safe: one thread may wait for it while another
// records it again; which of the records the wait refers to is then open.
class Event {
 public:
  virtual ~Event() = default;
  virtual bool passed() const = 0;
  virtual void wait_on_host() const = 0;
};

// Work in order. Copies are asynchronous; both ends must stay alive until an event after them has passed.
// Each stream is fed by one thread at a time.
class Stream {
 public:
  virtual ~Stream() = default;
  virtual void copy(void* to, const void* from, size_t bytes) = 0;
  virtual void wait(const Event& event) = 0;
  virtual void record(Event& event) = 0;
  virtual void synchronize() = 0;
  // The driver's own handle (cudaStream_t), or null.
  virtual void* native_handle() const { return nullptr; }
};

// Owns memory and its entry in a budget. Move-only.
class Buffer {
 public:
  Buffer() = default;
  Buffer(void* data, size_t bytes, std::function<void(void*)> free)
      : data_(data), bytes_(bytes), free_(std::move(free)) {}
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) free_(data_);
  }

  std::byte* data() const { return static_cast<std::byte*>(data_); }
  size_t bytes() const { return bytes_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(free_, other.free_);
  }

  void* data_ = nullptr;
  size_t bytes_ = 0;
  std::function<void(void*)> free_;
};

// Thread-safe. Must outlive its streams, events and buffers. Throws DeviceError when the driver refuses,
// CapacityError when a budget is passed.
class Device {
 public:
  virtual ~Device() = default;

  virtual std::string name() const = 0;
  virtual bool is_cuda() const = 0;
  virtual int index() const { return 0; }

  // The stream that the model computes on.
  virtual Stream& compute_stream() = 0;
  // Host values to device memory, in the compute stream; they are read before this returns. A copy would wait
  // for all that is on its way to the device in other streams, these do not.
  virtual void put(int64_t* to, std::span<const int64_t> values) = 0;
  // The compute stream goes on when the host has set the word, on CUDA in page-locked memory, to `value` or
  // to a later one (a number that may wrap around). Whoever sets it calls notify_all(). On a GPU this returns
  // at once.
  virtual void hold_until(const std::atomic<uint32_t>& word, uint32_t value) = 0;
  virtual std::unique_ptr<Stream> new_copy_stream() = 0;
  virtual std::unique_ptr<Event> new_event() = 0;
  // Milliseconds between the moments at which two recorded events passed.
  virtual double milliseconds_between(const Event& begin, const Event& end) const = 0;

  // Device memory, aligned to 4096 bytes, contents undefined.
  virtual Buffer allocate(size_t bytes, const std::string& what) = 0;
  // Host memory that copy streams read at full rate (page-locked on CUDA), aligned to 4096 bytes.
  virtual Buffer allocate_host(size_t bytes, const std::string& what) = 0;
  // A buffer of such memory for each of `bytes`, for gigabytes, with progress. near_last: the CPU reads what
  // lies at the end of each of them, so pages that are near it lie there; see near_pages.h.
  virtual std::vector<Buffer> allocate_host_parts(std::span<const uint64_t> bytes, const std::string& what,
                                                  bool near_last, const Progress& progress) = 0;

  virtual MemoryBudget& device_budget() = 0;
  virtual MemoryBudget& host_budget() = 0;
  // What the driver says this process's device holds now, context included; the budget's figure on CPU.
  virtual uint64_t driver_used_bytes() const = 0;
};

std::unique_ptr<Device> make_cpu_device(uint64_t device_budget_bytes, uint64_t host_budget_bytes);

// Throws ConfigError in a build without CUDA, DeviceError when there is no such GPU.
std::unique_ptr<Device> make_cuda_device(int index, uint64_t device_budget_bytes, uint64_t host_budget_bytes);

}  // namespace lighter
