// The machine's ceilings, measured: what a bound is computed from when the sweep does not give them.
#pragma once

#include "bench/sweep.h"
#include "runtime/device/device.h"

namespace lighter::bench {

// Fills what `given` leaves open; takes a few seconds and, of the device's budgets, up to 1 GiB of host
// memory and, on CUDA, 2.25 GiB of device memory, for as long as it runs. On the CPU, device memory is host
// memory and nothing computes beside the device, so `both` stays open. Throws DeviceError, CapacityError.
Rates measure_rates(Device& device, int threads, const Rates& given);

}  // namespace lighter::bench
