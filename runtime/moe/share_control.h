// Which share of the missed work the device takes and which the CPU: moves towards the point where each is the
// last to finish in half of the layers, step by step, since the best share changes with the machine's load.
// A plain value; not thread-safe.
#pragma once

#include <algorithm>

namespace lighter {

class ShareControl {
 public:
  static constexpr unsigned kWhole = 65536;

  // device_share: the first one, from 0 to 1. follow: whether it changes at all.
  ShareControl(double device_share, bool follow) : share_(device_share), follow_(follow) {}

  // Of kWhole.
  unsigned device_share() const { return static_cast<unsigned>(share_ * kWhole); }

  // late: in how many of the step's layers the device waited for the CPU, or could have had more to do.
  void step_ended(int late, int layers) {
    if (!follow_ || layers == 0) return;
    share_ = std::clamp(share_ + kGain * (2.0 * late / layers - 1), 0.0, 1.0);
  }

 private:
  static constexpr double kGain = 0.02;  // the most that a step changes

  double share_;
  bool follow_;
};

}  // namespace lighter
