// Who computes missed slices beside the device while decode steps run: the other side of a MissMailbox. A
// decode graph knows no more than this; offload/cpu_share.h stands behind it.
#pragma once

#include <cstdint>

#include "runtime/moe/miss_mailbox.h"
#include "runtime/moe/slice_places.h"

namespace lighter {

// What workers look up while they serve steps. All of it changes only between steps.
struct MissWork {
  MissMailbox mailbox;
  const SlicePlaces* places = nullptr;
  // Of 65536: the device's share of a layer's missed groups, the first of them; the rest is the workers'.
  const unsigned* device_share = nullptr;
};

struct MissWorkersCounters {
  uint64_t bytes = 0;  // of weights
  double busy_s = 0;   // from a post until its result was there
};

// One thread calls; counters() may be called by any.
class MissWorkers {
 public:
  virtual ~MissWorkers() = default;

  // Returns when the workers are awake and poll; they serve the steps from first_step on.
  virtual void start(const MissWork& work, uint32_t first_step) = 0;
  // Between steps. Throws DeviceError: what a worker met.
  virtual void stop() = 0;
  virtual MissWorkersCounters counters() const = 0;
};

}  // namespace lighter
