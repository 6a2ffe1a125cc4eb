#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAStream.h>

#include "runtime/torch/fused.h"

namespace lighter::fused {
namespace {

void* stream() {
  return c10::cuda::getCurrentCUDAStream().stream();
}

}  // namespace

bool available(const at::Tensor& x) {
  return x.is_cuda() && x.scalar_type() == at::kBFloat16 && x.size(-1) % 8 == 0;
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const at::Tensor rows = x.contiguous();
  const at::Tensor out = at::empty_like(rows);
  const int64_t width = x.size(-1);
  kernels::rms_norm(rows.const_data_ptr(), weight.const_data_ptr(), static_cast<float>(eps),
                    rows.numel() / width, width, out.data_ptr(), stream());
  return out;
}

at::Tensor silu_times(const at::Tensor& gate_up) {
  const int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  const at::Tensor out = at::empty({rows, width}, gate_up.options());
  kernels::silu_times(gate_up.const_data_ptr(), rows, width, out.data_ptr(), stream());
  return out;
}

bool qkv_available(const at::Tensor& qkv) {
  return available(qkv) && kernels::qkv_step_supports(static_cast<int>(qkv.size(-1)));
}

void qkv_step(const kernels::QkvStep& step) {
  kernels::qkv_step(step, stream());
}

}  // namespace lighter::fused
