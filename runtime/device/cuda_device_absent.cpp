#include "runtime/device/device.h"
#include "runtime/error.h"

namespace lighter {

std::unique_ptr<Device> make_cuda_device(int index, uint64_t, uint64_t) {
  throw ConfigError("device cuda:" + std::to_string(index) +
                    " asked of a build without CUDA; build with ./bootstrap.sh build --cuda, or set device: "
                    "cpu");
}

}  // namespace lighter
