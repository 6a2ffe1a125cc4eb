#include "offload/gpu_rates.h"
#include "runtime/error.h"

namespace lighter::offload {

GpuReading::GpuReading(Device&) {
  throw ConfigError("this build has no CUDA; build with ./bootstrap.sh build --cuda");
}

uint64_t GpuReading::read(Stream&, const std::byte*, uint64_t) {
  return 0;
}

uint64_t GpuReading::decode(Stream&, SliceEncoding, const std::byte*, uint64_t) {
  return 0;
}

}  // namespace lighter::offload
