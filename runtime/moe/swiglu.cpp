#include "runtime/moe/swiglu.h"

#include <ATen/ops/mm.h>
#include <ATen/ops/silu.h>

namespace lighter {

at::Tensor swiglu(const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down) {
  const int64_t ffn = down.size(1);
  const at::Tensor both = at::mm(x, gate_up.t());  // [tokens, 2 · ffn]
  at::Tensor activated = at::silu(both.narrow(1, 0, ffn));
  activated.mul_(both.narrow(1, ffn, ffn));
  return at::mm(activated, down.t());
}

}  // namespace lighter
