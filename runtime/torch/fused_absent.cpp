#include "runtime/error.h"
#include "runtime/torch/fused.h"

namespace lighter::fused {
namespace {

[[noreturn]] void absent() {
  throw ConfigError("this build has no CUDA; build with ./bootstrap.sh build --cuda");
}

}  // namespace

bool available(const at::Tensor&) {
  return false;
}

at::Tensor rms_norm(const at::Tensor&, const at::Tensor&, double) {
  absent();
}

at::Tensor silu_times(const at::Tensor&) {
  absent();
}

bool qkv_available(const at::Tensor&) {
  return false;
}

void qkv_step(const kernels::QkvStep&) {
  absent();
}

}  // namespace lighter::fused
