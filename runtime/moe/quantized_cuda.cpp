#include "runtime/moe/quantized_cuda.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <array>

#include "runtime/kernels/dequantize_slices.h"
#include "runtime/kernels/quant_slice.h"
#include "runtime/moe/swiglu.h"

namespace lighter::quantized_cuda {
namespace {

kernels::Encoding kernel_encoding(SliceEncoding encoding) {
  return encoding == SliceEncoding::int8 ? kernels::Encoding::int8 : kernels::Encoding::int4;
}

bool few(RowRange rows) {
  return rows.count <= kernels::max_tokens;
}

}  // namespace

void prepare(Device& device, SliceShape shape, SliceEncoding encoding, std::span<const RowRange> experts,
             int slices, RoutedInput& input) {
  const auto options = input.x.options();
  if (!std::ranges::all_of(experts, few)) {
    const int64_t ffn = slices * shape.width;
    input.gate_up = at::empty({2 * ffn, shape.hidden}, options.dtype(at::kBFloat16));
    input.down = at::empty({shape.hidden, ffn}, options.dtype(at::kBFloat16));
  }
  int64_t most = 0;
  for (const RowRange rows : experts) most = few(rows) ? std::max(most, rows.count) : most;
  if (most == 0) return;
  const int64_t rows = input.x.size(0), groups = shape.hidden / group_size(encoding);
  input.q = at::empty({rows, shape.hidden}, options.dtype(at::kChar));
  input.scales = at::empty({rows, groups}, options.dtype(at::kFloat));
  input.sums = at::empty({rows, groups}, options.dtype(at::kFloat));
  const auto kind = kernel_encoding(encoding);
  const uint64_t bytes = kernels::workspace_bytes(
      kind, {shape.hidden, shape.width}, std::min(slices, kernels::max_slices), static_cast<int>(most));
  input.workspace = at::empty({static_cast<int64_t>(bytes)}, options.dtype(at::kByte));
  kernels::quantize_activations(
      kind,
      input.x.scalar_type() == at::kFloat ? kernels::ActivationType::fp32 : kernels::ActivationType::bf16,
      rows, shape.hidden, input.x.data_ptr(),
      {input.q.data_ptr<int8_t>(), input.scales.data_ptr<float>(), input.sums.data_ptr<float>()},
      device.compute_stream().native_handle());
}

void accumulate(Device& device, SliceShape shape, SliceEncoding encoding, int first,
                std::span<const std::byte* const> slices, const RoutedInput& input, RowRange rows) {
  const auto kind = kernel_encoding(encoding);
  void* stream = device.compute_stream().native_handle();
  const int64_t at = rows.first * shape.hidden,
                group_at = rows.first * (few(rows) ? input.scales.size(1) : 0);
  for (size_t begin = 0; begin < slices.size(); begin += kernels::max_slices) {
    const auto part = slices.subspan(begin, std::min<size_t>(kernels::max_slices, slices.size() - begin));
    std::array<const void*, kernels::max_slices> addresses{};
    std::ranges::copy(part, addresses.begin());
    const int count = static_cast<int>(part.size());
    if (few(rows)) {
      kernels::SliceList list;
      list.on_host = addresses.data();
      list.count = count;
      kernels::slices_forward(kind, {shape.hidden, shape.width}, list, static_cast<int>(rows.count),
                              {input.q.data_ptr<int8_t>() + at, input.scales.data_ptr<float>() + group_at,
                               input.sums.data_ptr<float>() + group_at},
                              input.workspace.data_ptr(), input.sum.data_ptr<float>() + at, stream);
    } else {
      kernels::dequantize_slices(kind, {shape.hidden, shape.width},
                                 {addresses.data(), first + static_cast<int>(begin), count,
                                  static_cast<int>(input.down.size(1) / shape.width)},
                                 input.gate_up.data_ptr(), input.down.data_ptr(), stream);
    }
  }
}

void finish(const RoutedInput& input, RowRange rows) {
  if (few(rows)) return;
  const at::Tensor x = input.x.narrow(0, rows.first, rows.count).to(at::kBFloat16);
  at::Tensor sum = input.sum.narrow(0, rows.first, rows.count);
  at::mm_out(sum, gated(at::mm(x, input.gate_up.t())), input.down.t(), at::kFloat);
}

}  // namespace lighter::quantized_cuda
