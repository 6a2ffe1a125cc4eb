// Measures a machine: what `lighter calibrate` writes and what bounds are computed from. Needs no libtorch.
#pragma once

#include <algorithm>
#include <string>

#include "offload/calibration.h"
#include "runtime/device/device.h"
#include "runtime/progress.h"

namespace lighter::offload {

// What both functions take of a device's budget at most, for as long as they run, and of the host's, of which
// they may hold more for a moment to choose near pages from.
inline constexpr uint64_t kCalibrationDeviceBytes = (uint64_t{1} << 30) + (uint64_t{256} << 20);
// The CPU reads most of it over and over, so that must be far more than its last-level cache: 300 MB on the
// hosts of large GPUs.
constexpr uint64_t ceilings_host_bytes(bool cuda) {
  return uint64_t{cuda ? 4u : 1u} << 30;
}
// Of a host budget, and no more than a quarter of the machine's memory, which others may need. Large, so that
// memory of different speed, where a machine has it, counts as it will in a model's store.
constexpr uint64_t calibration_host_bytes(bool cuda, uint64_t host_budget, uint64_t machine_memory) {
  constexpr uint64_t most = uint64_t{32} << 30, whole = uint64_t{512} << 20;  // quarters of whole copies
  const uint64_t least = ceilings_host_bytes(cuda);
  return cuda ? std::clamp(std::min(host_budget / 2, machine_memory / 4), least, most) / whole * whole
              : least;
}

// Fills what `given` leaves open, in a few seconds. On the CPU, device memory is host memory and nothing
// computes beside the device, so `both` stays open. Throws DeviceError, CapacityError.
Rates measure_ceilings(Device& device, int threads, const Rates& given);

// Everything but dense kernels on the CPU, tensor_tflops, kv_read and the fixed costs, which stay those of
// default_calibration(). Takes about half a minute. threads: of the CPU's experts. host_bytes: to read.
// progress: told what is done next. Throws as above, and what progress throws.
Calibration calibrate(Device& device, int threads, uint64_t host_bytes, const Progress& progress);

}  // namespace lighter::offload
