#include "runtime/moe/packed_cuda.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "runtime/kernels/dequantize_matrix.h"
#include "runtime/kernels/dequantize_slices.h"
#include "runtime/kernels/quant_slice.h"

namespace lighter::packed_cuda {
namespace {

kernels::Encoding kernel_encoding(SliceEncoding encoding) {
  return encoding == SliceEncoding::int8 ? kernels::Encoding::int8 : kernels::Encoding::int4;
}

}  // namespace

void dequantize_rows(Device& device, SliceEncoding encoding, const PackedMatrix& matrix,
                     const std::byte* data, int64_t first, int64_t count, const at::Tensor& out) {
  const int64_t groups = matrix.columns / group_size(encoding);
  const int64_t row_bytes = encoding == SliceEncoding::int8 ? matrix.columns : matrix.columns / 2;
  const int64_t scales = first * groups * static_cast<int64_t>(sizeof(uint16_t));
  kernels::dequantize_matrix(kernel_encoding(encoding),
                             {data + matrix.values_at + first * row_bytes, data + matrix.scales_at + scales,
                              data + matrix.minimums_at + scales},
                             count, matrix.columns, out.data_ptr(), out.stride(0),
                             device.compute_stream().native_handle());
}

void dequantize_ffn(Device& device, const PackedWeight& ffn, const at::Tensor& gate_up, const at::Tensor& down) {
  const void* addresses[kernels::max_slices];
  for (int64_t first = 0; first < ffn.slices; first += kernels::max_slices) {
    const auto count = static_cast<int>(std::min<int64_t>(kernels::max_slices, ffn.slices - first));
    for (int i = 0; i < count; ++i) addresses[i] = ffn.data + (first + i) * ffn.slice_bytes();
    kernels::dequantize_slices(kernel_encoding(ffn.encoding), {ffn.columns, ffn.slice_width},
                               {addresses, static_cast<int>(first), count, static_cast<int>(ffn.slices)},
                               gate_up.data_ptr(), down.data_ptr(), device.compute_stream().native_handle());
  }
}

at::Tensor ffn_of_few(Device& device, const PackedWeight& ffn, const at::Tensor& input) {
  const at::Tensor x = input.contiguous();
  const auto kind = kernel_encoding(ffn.encoding);
  const kernels::QuantSliceShape shape{ffn.columns, ffn.slice_width};
  const auto tokens = static_cast<int>(x.size(0));
  const auto most = static_cast<int>(std::min<int64_t>(ffn.slices, kernels::max_slices));
  const int64_t groups = ffn.columns / group_size(ffn.encoding);
  void* stream = device.compute_stream().native_handle();

  const at::Tensor q = at::empty({tokens, ffn.columns}, x.options().dtype(at::kChar));
  const at::Tensor scales = at::empty({2, tokens, groups}, x.options().dtype(at::kFloat));
  const at::Tensor workspace =
      at::empty({static_cast<int64_t>(kernels::workspace_bytes(kind, shape, most, tokens))},
                x.options().dtype(at::kByte));
  const at::Tensor sum = at::zeros({tokens, ffn.columns}, x.options().dtype(at::kFloat));
  const kernels::QuantizedActivations activations{q.data_ptr<int8_t>(), scales[0].data_ptr<float>(),
                                                  scales[1].data_ptr<float>()};
  kernels::quantize_activations(
      kind, x.scalar_type() == at::kFloat ? kernels::ActivationType::fp32 : kernels::ActivationType::bf16,
      tokens, ffn.columns, x.data_ptr(), activations, stream);
  const uint64_t slice_bytes = ffn.slice_bytes();
  const void* addresses[kernels::max_slices];
  for (int64_t first = 0; first < ffn.slices; first += most) {
    kernels::SliceList list;
    list.on_host = addresses;
    list.count = static_cast<int>(std::min<int64_t>(most, ffn.slices - first));
    for (int i = 0; i < list.count; ++i) addresses[i] = ffn.data + (first + i) * slice_bytes;
    kernels::slices_forward(kind, shape, list, tokens, activations, workspace.data_ptr(),
                            sum.data_ptr<float>(), stream);
  }
  return sum;
}

}  // namespace lighter::packed_cuda
