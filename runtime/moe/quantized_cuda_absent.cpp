#include "runtime/error.h"
#include "runtime/moe/quantized_cuda.h"

namespace lighter::quantized_cuda {

void prepare(Device&, SliceShape, SliceEncoding, ExpertInput&) {
  throw ConfigError("this build has no CUDA; build with ./bootstrap.sh build --cuda");
}

void accumulate(Device&, SliceShape, SliceEncoding, const std::byte*, const ExpertInput&, at::Tensor&) {
  throw ConfigError("this build has no CUDA; build with ./bootstrap.sh build --cuda");
}

}  // namespace lighter::quantized_cuda
