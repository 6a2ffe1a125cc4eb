#include "runtime/moe/quantized_cuda.h"

#include <ATen/ops/empty.h>

#include "runtime/kernels/quant_slice.h"
#include "runtime/moe/swiglu.h"

namespace lighter::quantized_cuda {
namespace {

kernels::Encoding kernel_encoding(SliceEncoding encoding) {
  return encoding == SliceEncoding::int8 ? kernels::Encoding::int8 : kernels::Encoding::int4;
}

kernels::QuantizedActivations activations(const ExpertInput& input) {
  return {input.q.data_ptr<int8_t>(), input.scales.data_ptr<float>(), input.sums.data_ptr<float>()};
}

}  // namespace

void prepare(Device& device, SliceShape shape, SliceEncoding encoding, ExpertInput& input) {
  const int64_t tokens = input.x.size(0);
  if (tokens > kernels::max_tokens) return;
  const auto options = input.x.options();
  const int64_t groups = shape.hidden / group_size(encoding);
  input.q = at::empty({tokens, shape.hidden}, options.dtype(at::kChar));
  input.scales = at::empty({tokens, groups}, options.dtype(at::kFloat));
  input.sums = at::empty({tokens, groups}, options.dtype(at::kFloat));
  const auto kind = kernel_encoding(encoding);
  const kernels::QuantSliceShape kernel_shape{shape.hidden, shape.width};
  const uint64_t bytes = kernels::workspace_bytes(kind, kernel_shape, 1, static_cast<int>(tokens));
  input.workspace = at::empty({static_cast<int64_t>(bytes)}, options.dtype(at::kByte));
  void* stream = device.compute_stream().native_handle();
  kernels::quantize_activations(
      kind,
      input.x.scalar_type() == at::kFloat ? kernels::ActivationType::fp32 : kernels::ActivationType::bf16,
      tokens, shape.hidden, input.x.data_ptr(), activations(input), stream);
}

void accumulate(Device& device, SliceShape shape, SliceEncoding encoding, const std::byte* slice,
                const ExpertInput& input, at::Tensor& sum) {
  const auto kind = kernel_encoding(encoding);
  const kernels::QuantSliceShape kernel_shape{shape.hidden, shape.width};
  void* stream = device.compute_stream().native_handle();
  if (input.q.defined()) {
    const void* address = slice;
    kernels::SliceList list;
    list.on_host = &address;
    list.count = 1;
    kernels::slices_forward(kind, kernel_shape, list, static_cast<int>(input.x.size(0)), activations(input),
                            input.workspace.data_ptr(), sum.data_ptr<float>(), stream);
    return;
  }
  const auto options = input.x.options().dtype(at::kBFloat16);
  const at::Tensor gate_up = at::empty({2 * shape.width, shape.hidden}, options);
  const at::Tensor down = at::empty({shape.hidden, shape.width}, options);
  kernels::dequantize_slice(kind, kernel_shape, slice, gate_up.data_ptr(), down.data_ptr(), stream);
  sum.add_(swiglu(input.x.to(at::kBFloat16), gate_up, down));
}

}  // namespace lighter::quantized_cuda
