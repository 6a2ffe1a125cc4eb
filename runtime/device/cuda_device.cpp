#include <cuda_runtime_api.h>
#include <spdlog/spdlog.h>

#include <memory>
#include <numeric>

#include "runtime/bytes.h"
#include "runtime/device/device.h"
#include "runtime/device/host_words.h"
#include "runtime/device/near_pages.h"
#include "runtime/error.h"

namespace lighter {
namespace {

void check(cudaError_t result, const char* doing) {
  if (result != cudaSuccess) {
    throw DeviceError(std::string("CUDA: ") + doing + ": " + cudaGetErrorString(result));
  }
}

// For destructors, which must not throw.
void log_failure(cudaError_t result, const char* doing) noexcept {
  if (result != cudaSuccess && result != cudaErrorCudartUnloading) {
    spdlog::error("CUDA: {}: {}", doing, cudaGetErrorString(result));
  }
}

class CudaEvent : public Event {
 public:
  CudaEvent() { check(cudaEventCreate(&event_), "creating an event"); }
  ~CudaEvent() override { log_failure(cudaEventDestroy(event_), "destroying an event"); }
  CudaEvent(const CudaEvent&) = delete;
  CudaEvent& operator=(const CudaEvent&) = delete;

  bool passed() const override {
    const cudaError_t result = cudaEventQuery(event_);
    if (result == cudaErrorNotReady) return false;
    check(result, "querying an event");
    return true;
  }
  void wait_on_host() const override { check(cudaEventSynchronize(event_), "waiting for an event"); }
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

cudaEvent_t native(const Event& event) {
  return static_cast<const CudaEvent&>(event).get();
}

class CudaStream : public Stream {
 public:
  explicit CudaStream(int device) : device_(device) {
    check(cudaSetDevice(device_), "choosing the device");
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
  }
  ~CudaStream() override { log_failure(cudaStreamDestroy(stream_), "destroying a stream"); }
  CudaStream(const CudaStream&) = delete;
  CudaStream& operator=(const CudaStream&) = delete;

  void copy(void* to, const void* from, size_t bytes) override {
    check(cudaSetDevice(device_), "choosing the device");  // of a thread that may be new
    check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_), "copying");
  }
  void wait(const Event& event) override {
    check(cudaStreamWaitEvent(stream_, native(event), 0), "making a stream wait");
  }
  void record(Event& event) override { check(cudaEventRecord(native(event), stream_), "recording an event"); }
  void synchronize() override { check(cudaStreamSynchronize(stream_), "waiting for a stream"); }
  void* native_handle() const override { return stream_; }

 private:
  const int device_;
  cudaStream_t stream_ = nullptr;
};

class CudaDevice : public Device {
 public:
  CudaDevice(int index, uint64_t device_budget_bytes, uint64_t host_budget_bytes)
      : index_(choose(index)),
        device_budget_("memory.gpu_budget", device_budget_bytes),
        host_budget_("memory.host_budget", host_budget_bytes),
        compute_stream_(index) {
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    check(cudaMemGetInfo(&free_bytes, &total_bytes), "asking for free memory");
    if (device_budget_bytes > total_bytes) {
      throw CapacityError("memory.gpu_budget is " + format_bytes(device_budget_bytes) + ", but " + name() +
                          " has " + format_bytes(total_bytes) + "; lower the budget");
    }
    constexpr uint64_t context_allowance = uint64_t{1} << 30;
    if (device_budget_bytes > free_bytes + context_allowance) {
      throw CapacityError("memory.gpu_budget is " + format_bytes(device_budget_bytes) + ", but only " +
                          format_bytes(free_bytes) + " of " + name() +
                          " are free; end the other programs on it or lower the budget");
    }
  }

  std::string name() const override {
    cudaDeviceProp properties;
    check(cudaGetDeviceProperties(&properties, index_), "asking for the device's name");
    return properties.name;
  }
  bool is_cuda() const override { return true; }
  int index() const override { return index_; }
  Stream& compute_stream() override { return compute_stream_; }
  void put(int64_t* to, std::span<const int64_t> values) override {
    check(cudaSetDevice(index_), "choosing the device");
    put_values(to, values.data(), static_cast<int64_t>(values.size()), compute_stream_.native_handle());
  }
  void hold_until(const std::atomic<uint32_t>& word, uint32_t value) override {
    check(cudaSetDevice(index_), "choosing the device");
    hold_stream(&word, value, compute_stream_.native_handle());
  }
  std::unique_ptr<Stream> new_copy_stream() override { return std::make_unique<CudaStream>(index_); }
  std::unique_ptr<Event> new_event() override {
    check(cudaSetDevice(index_), "choosing the device");
    return std::make_unique<CudaEvent>();
  }
  double milliseconds_between(const Event& begin, const Event& end) const override {
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, native(begin), native(end)), "timing events");
    return milliseconds;
  }

  Buffer allocate(size_t bytes, const std::string& what) override {
    if (bytes == 0) return {};
    device_budget_.take(bytes, what);
    void* data = nullptr;
    const cudaError_t result = cudaMalloc(&data, bytes);
    if (result != cudaSuccess) {
      cudaGetLastError();  // Clears it: the next call must not report this one's failure.
      device_budget_.give_back(bytes);
      throw CapacityError("the GPU refused " + format_bytes(bytes) + " for " + what + " (" +
                          cudaGetErrorString(result) + "); lower memory.gpu_budget");
    }
    return Buffer(data, bytes, [this, bytes](void* memory) {
      log_failure(cudaFree(memory), "freeing device memory");
      device_budget_.give_back(bytes);
    });
  }

  Buffer allocate_host(size_t bytes, const std::string& what) override {
    return std::move(allocate_host_parts({{bytes}}, what, false, kNoProgress).front());
  }

  // Touched by all threads first: that and cudaHostRegister are several times faster than cudaHostAlloc.
  std::vector<Buffer> allocate_host_parts(std::span<const uint64_t> bytes, const std::string& what,
                                          bool near_last, const Progress& progress) override {
    std::vector<Buffer> parts = take_host_parts(bytes, host_budget_, what, near_last, progress);
    const uint64_t total = std::accumulate(bytes.begin(), bytes.end(), uint64_t{0});
    uint64_t done = 0;
    for (Buffer& part : parts) {
      if (!part) continue;
      part = page_locked(std::move(part), what);
      done += part.bytes();
      progress("page-locking host memory", done, total);
    }
    return parts;
  }

  MemoryBudget& device_budget() override { return device_budget_; }
  MemoryBudget& host_budget() override { return host_budget_; }
  uint64_t driver_used_bytes() const override {
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    check(cudaMemGetInfo(&free_bytes, &total_bytes), "asking for free memory");
    return total_bytes - free_bytes;
  }

 private:
  static Buffer page_locked(Buffer memory, const std::string& what) {
    void* const data = memory.data();
    const size_t bytes = memory.bytes();
    check(cudaHostRegister(data, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped),
          ("page-locking " + format_bytes(bytes) + " of host memory for " + what).c_str());
    return Buffer(data, bytes, [held = std::make_shared<Buffer>(std::move(memory))](void* locked) mutable {
      log_failure(cudaHostUnregister(locked), "releasing page-locked memory");
      held.reset();
    });
  }

  static int choose(int index) {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
    if (index >= count) {
      throw ConfigError("device cuda:" + std::to_string(index) + " is not there: this machine shows " +
                        std::to_string(count) + " CUDA devices; set device: cpu or another index");
    }
    check(cudaSetDevice(index), "choosing the device");
    return index;
  }

  const int index_;
  MemoryBudget device_budget_;
  MemoryBudget host_budget_;
  CudaStream compute_stream_;
};

}  // namespace

std::unique_ptr<Device> make_cuda_device(int index, uint64_t device_budget_bytes,
                                         uint64_t host_budget_bytes) {
  return std::make_unique<CudaDevice>(index, device_budget_bytes, host_budget_bytes);
}

}  // namespace lighter
