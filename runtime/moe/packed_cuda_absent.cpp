#include "runtime/error.h"
#include "runtime/moe/packed_cuda.h"

namespace lighter::packed_cuda {

void dequantize_rows(Device&, SliceEncoding, const PackedMatrix&, const std::byte*, int64_t, int64_t,
                     const at::Tensor&) {
  throw ConfigError("this build has no CUDA; build with ./bootstrap.sh build --cuda");
}

at::Tensor ffn_of_few(Device&, const PackedWeight&, const at::Tensor&) {
  throw ConfigError("this build has no CUDA; build with ./bootstrap.sh build --cuda");
}

void dequantize_ffn(Device&, const PackedWeight&, const at::Tensor&, const at::Tensor&) {
  throw ConfigError("this build has no CUDA; build with ./bootstrap.sh build --cuda");
}

}  // namespace lighter::packed_cuda
