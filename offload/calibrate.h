// Measures a machine: what `lighter calibrate` writes and what bounds are computed from. Needs no libtorch.
#pragma once

#include <functional>
#include <string>

#include "offload/calibration.h"
#include "runtime/device/device.h"

namespace lighter::offload {

// What both functions take of a device's budgets at most, for as long as they run.
inline constexpr uint64_t kCalibrationDeviceBytes = (uint64_t{1} << 30) + (uint64_t{256} << 20);
// The CPU reads half of it over and over, so that must be far more than its last-level cache: 300 MB on the hosts of
// large GPUs.
constexpr uint64_t calibration_host_bytes(bool cuda) {
  return uint64_t{cuda ? 4u : 1u} << 30;
}

// Fills what `given` leaves open, in a few seconds. On the CPU, device memory is host memory and nothing
// computes beside the device, so `both` stays open. Throws DeviceError, CapacityError.
Rates measure_ceilings(Device& device, int threads, const Rates& given);

// Everything but dense kernels on the CPU, tensor_tflops, kv_read and the fixed costs, which stay those of
// default_calibration(). Takes about ten seconds. threads: of the CPU's experts. begins: told what
// is measured next. Throws as above, and what begins throws.
Calibration calibrate(Device& device, int threads,
                      const std::function<void(const std::string& what)>& begins);

}  // namespace lighter::offload
