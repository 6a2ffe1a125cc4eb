// The CUDA half of TorchScope, apart because a CPU build has no libtorch_cuda.
#pragma once

#include <cstdint>
#include <memory>

#include "runtime/device/device.h"

namespace lighter {

class CudaRules {
 public:
  virtual ~CudaRules() = default;
  virtual uint64_t peak_bytes() const = 0;
};

// Makes the device's compute stream libtorch's current one and bounds its caching allocator.
std::unique_ptr<CudaRules> make_cuda_rules(Device& device, uint64_t workspace_bytes);

}  // namespace lighter
