// Work for a GPU whose only purpose is to be timed; apart, because a CPU build has no CUDA kernels.
#pragma once

#include "runtime/device/device.h"
#include "runtime/quant/packed_slice.h"

namespace lighter::offload {

// Not thread-safe. Both functions enqueue and return how many bytes will be read; memory (of the device, or
// of the host and page-locked) must be filled with fill_with_weights() and stay until the stream is done.
class GpuReading {
 public:
  // Throws ConfigError in a build without CUDA kernels, DeviceError for a device without them.
  explicit GpuReading(Device& device);

  // Plainly, as fast as the device can.
  uint64_t read(Stream& stream, const std::byte* memory, uint64_t bytes);
  // By the linear layers of a decode step: as many matrices of Scout's size as fit, for one token.
  uint64_t decode(Stream& stream, SliceEncoding encoding, const std::byte* memory, uint64_t bytes);

 private:
  Buffer in_, out_;
};

}  // namespace lighter::offload
