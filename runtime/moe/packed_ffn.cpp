#include "runtime/moe/packed_ffn.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "runtime/moe/packed_cuda.h"
#include "runtime/moe/packed_linear.h"
#include "runtime/moe/swiglu.h"
#include "runtime/quant/cpu_slice.h"

namespace lighter {
namespace {

at::Tensor few_on_cpu(const at::Tensor& x, const PackedWeight& ffn) {
  thread_local CpuScratch scratch;  // kept from layer to layer; a few rows of activations
  const at::Tensor input = x.to(at::kFloat).contiguous();
  const at::Tensor sum = at::zeros(x.sizes(), input.options());
  const CpuSliceKernel kernel(ffn.encoding, ffn.columns, ffn.slice_width);
  for (int64_t i = 0; i < ffn.slices; ++i) {
    kernel.accumulate(ffn.data + i * kernel.layout().bytes, input.const_data_ptr<float>(), x.size(0),
                      sum.mutable_data_ptr<float>(), scratch, CpuThreads::tbb);
  }
  return sum;
}

void dequantize(Device& device, const PackedWeight& ffn, const at::Tensor& gate_up, const at::Tensor& down) {
  const PackedSliceLayout layout = packed_slice_layout(ffn.encoding, ffn.columns, ffn.slice_width);
  const int64_t width = ffn.slices * ffn.slice_width;
  for (int64_t i = 0; i < ffn.slices; ++i) {
    const std::byte* slice = ffn.data + i * layout.bytes;
    const int64_t at = i * ffn.slice_width;
    const auto unpack = [&](SliceMatrix matrix, const at::Tensor& out) {
      unpack_rows(device, ffn.encoding, layout[matrix], slice, 0, out);
    };
    unpack(SliceMatrix::gate, gate_up.narrow(0, at, ffn.slice_width));
    unpack(SliceMatrix::up, gate_up.narrow(0, width + at, ffn.slice_width));
    unpack(SliceMatrix::down, down.narrow(1, at, ffn.slice_width));
  }
}

at::Tensor many(Device& device, const at::Tensor& x, const PackedWeight& ffn) {
  const at::Tensor input = device.is_cuda() ? x.to(at::kBFloat16) : x;
  const int64_t width = ffn.slices * ffn.slice_width;
  const at::Tensor gate_up = at::empty({2 * width, ffn.columns}, input.options());
  const at::Tensor down = at::empty({ffn.rows, width}, input.options());
  if (device.is_cuda()) {
    packed_cuda::dequantize_ffn(device, ffn, gate_up, down);
  } else {
    dequantize(device, ffn, gate_up, down);
  }
  return swiglu(input, gate_up, down);
}

}  // namespace

at::Tensor packed_ffn(Device& device, const at::Tensor& x, const PackedWeight& ffn) {
  const bool few = x.size(0) <= kFewTokens;
  const at::Tensor out = !few               ? many(device, x, ffn)
                         : device.is_cuda() ? packed_cuda::ffn_of_few(device, ffn, x)
                                            : few_on_cpu(x, ffn);
  return out.to(x.scalar_type());
}

at::Tensor shared_output(Device& device, const at::Tensor& x, const SharedExpert& expert) {
  return expert.packed ? packed_ffn(device, x, *expert.packed) : swiglu(x, expert.gate_up, expert.down);
}

uint64_t packed_ffn_bytes(int64_t hidden, int64_t width, int64_t tokens, DType dtype, bool cuda) {
  // int8 and fp32 of the input, fp32 of the sum; on a GPU also the hidden activations in fp32 and int8,
  // scaled.
  const int64_t few =
      std::min(tokens, kFewTokens) * (hidden * 10 + (cuda ? width * 6 : 0)) + (int64_t{cuda ? 1 : 0} << 16);
  if (tokens <= kFewTokens) return few;
  const int64_t element = cuda ? 2 : static_cast<int64_t>(dtype_size(dtype));
  return std::max(few, (3 * hidden * width + tokens * (3 * width + 2 * hidden)) * element);
}

}  // namespace lighter
