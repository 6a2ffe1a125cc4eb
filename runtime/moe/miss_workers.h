// Who computes missed slices beside the device while decode steps run, or brings them: the other side of a
// MissMailbox. A decode graph knows no more than this; offload/cpu_share.h and offload/miss_fetcher.h stand
// behind it.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "runtime/moe/miss_mailbox.h"
#include "runtime/moe/slice_places.h"

namespace lighter {

// What workers look up while they serve a step. All of it changes only between steps, but for what lies in
// the slot of another one; places, only while the workers are idle().
struct MissWork {
  // Where workers that copy bring missed slices, those of a layer one after another, and what they write
  // after each; see Arrivals in runtime/kernels/decode.h.
  struct Arrivals {
    std::byte* slots = nullptr;   // device
    uint32_t* arrived = nullptr;  // device, one for each slot
    uint32_t* tags = nullptr;     // page-locked host memory, one for each layer: what is written there
  };

  MissMailbox mailbox;
  const SlicePlaces* places = nullptr;
  // Of 65536: the device's share of a layer's missed groups, the first of them; the rest is the workers'. Of
  // each step in its slot.
  const std::atomic<unsigned>* device_shares = nullptr;
  Arrivals arrivals;
};

struct MissWorkersCounters {
  uint64_t bytes = 0;            // of weights
  double busy_s = 0;             // from a post until its layer was done
  uint64_t layers = 0;           // that had misses for them
  uint64_t layers_expected = 0;  // of these, with the experts that were expected
};

// When the workers had a layer's misses: steady_clock, nanoseconds.
struct MissSpan {
  int layer = 0;
  int64_t begin_ns = 0;
  int64_t end_ns = 0;
};

// One thread calls; counters() may be called by any.
class MissWorkers {
 public:
  virtual ~MissWorkers() = default;

  // Returns when the workers are awake and poll; they serve the steps from first_step on.
  virtual void start(const MissWork& work, uint32_t first_step) = 0;
  // Between steps. Throws DeviceError: what a worker met.
  virtual void stop() = 0;
  // While they poll, when the last layer posted is done: whether no worker looks anything up, which one may
  // still do that has come too late to the layer. It then stays so until more is posted.
  virtual bool idle() const = 0;
  virtual MissWorkersCounters counters() const = 0;
  // The latest of each layer that had any. After stop().
  virtual std::vector<MissSpan> latest_spans() const = 0;
};

}  // namespace lighter
