// Host → device copies in two classes: demand, which the step waits for, and prefetch, a guess.
//
// A prefetch never delays a demand: it is copied piece by piece, one piece outstanding, and no piece starts
// while a demand copy is outstanding, so a demand waits at most for one piece (2 MiB: 40 µs on PCIe 5).
// When the step comes to need a slice that is still being prefetched, the rest of it becomes a demand.
//
// Demand calls come from one thread (the step's); prefetch() from any. One thread of its own carries out the
// prefetches; it is ended by the destructor, and what it threw is thrown by rethrow().
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "runtime/device/device.h"

namespace lighter::offload {

struct CopyRequest {
  std::byte* to = nullptr;
  const std::byte* from = nullptr;
  size_t bytes = 0;
  const Event* last_use = nullptr;  // of the destination: the copy waits for it
  Event* ready = nullptr;  // recorded after the copy; waited for before it (a slot's earlier filling)
};

// A prefetch under way. Its request's events belong to it until expedite() or cancel() has returned.
struct PrefetchCopy {
  CopyRequest request;
  std::function<void()> ended;  // called once by the engine's thread: copied, cancelled or expedited

  std::mutex mutex;
  size_t issued_bytes = 0;
  bool taken = false;  // the engine's thread must not touch it any more
};

struct TransferCounters {
  uint64_t demand_bytes = 0;
  uint64_t prefetch_bytes = 0;
  double demand_busy_s = 0;        // time with a demand copy outstanding, as the device's clock has it
  uint64_t demand_busy_bytes = 0;  // bytes copied in that time
};

class TransferEngine {
 public:
  explicit TransferEngine(Device& device, size_t piece_bytes = size_t{2} << 20);
  ~TransferEngine();

  void fetch(const CopyRequest& request);
  // Whether a demand copy is still under way.
  bool demand_outstanding();

  std::shared_ptr<PrefetchCopy> prefetch(const CopyRequest& request, std::function<void()> ended);
  // Makes the rest of a prefetch a demand; afterwards request.ready covers the whole copy.
  void expedite(PrefetchCopy& copy);
  // Stops a prefetch; request.ready then covers what was already under way. Returns the bytes copied in vain.
  size_t cancel(PrefetchCopy& copy);

  // Throws what the prefetch thread met, if anything.
  void rethrow();
  // Call when all demand copies have passed (after a step).
  TransferCounters counters();

 private:
  void work();
  void carry_out(PrefetchCopy& copy);
  void begin_demand();
  void end_demand(size_t bytes);
  void add_busy_time();

  Device& device_;
  const size_t piece_bytes_;
  std::unique_ptr<Stream> demand_stream_;
  std::unique_ptr<Stream> prefetch_stream_;

  std::mutex demand_mutex_;  // guards the two events and the counters
  std::unique_ptr<Event> busy_begin_;
  std::unique_ptr<Event> busy_end_;
  bool busy_recorded_ = false;
  uint64_t busy_bytes_ = 0;
  TransferCounters counters_;

  std::mutex mutex_;  // guards the queue
  std::condition_variable changed_;
  std::deque<std::shared_ptr<PrefetchCopy>> queue_;
  bool ending_ = false;
  std::exception_ptr failure_;
  std::thread thread_;
};

}  // namespace lighter::offload
