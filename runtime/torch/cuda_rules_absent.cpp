#include "runtime/error.h"
#include "runtime/torch/cuda_rules.h"

namespace lighter {

std::unique_ptr<CudaRules> make_cuda_rules(Device&, uint64_t) {
  throw ConfigError("this build has no CUDA; build with ./bootstrap.sh build --cuda");
}

}  // namespace lighter
