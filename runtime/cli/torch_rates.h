// What libtorch's matrix products reach: the figures of a calibration that offload/calibrate.h cannot
// measure.
#pragma once

#include "runtime/device/device.h"
#include "runtime/dtype.h"

namespace lighter::cli {

inline constexpr uint64_t kTorchRatesBytes = uint64_t{1} << 30;  // of the device's budget

struct TorchRates {
  double tensor_tflops = 0;
  double dense_gb_per_s = 0;  // weights read by a linear layer for one token
};
// A second or two. One TorchScope at a time, so none may be alive. Throws CapacityError, c10::Error.
TorchRates measure_torch_rates(Device& device, DType dtype, int threads);

}  // namespace lighter::cli
