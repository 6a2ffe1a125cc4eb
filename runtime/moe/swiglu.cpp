#include "runtime/moe/swiglu.h"

#include <ATen/ops/mm.h>
#include <ATen/ops/silu.h>

#include "runtime/torch/fused.h"

namespace lighter {

at::Tensor gated(const at::Tensor& gate_up) {
  const int64_t ffn = gate_up.size(1) / 2;
  if (ffn % 8 == 0 && fused::available(gate_up)) return fused::silu_times(gate_up);
  at::Tensor activated = at::silu(gate_up.narrow(1, 0, ffn));
  activated.mul_(gate_up.narrow(1, ffn, ffn));
  return activated;
}

at::Tensor swiglu(const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down) {
  return at::mm(gated(at::mm(x, gate_up.t())), down.t());
}

}  // namespace lighter
