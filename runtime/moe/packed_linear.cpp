#include "runtime/moe/packed_linear.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>

#include "runtime/moe/packed_cuda.h"
#include "runtime/quant/cpu_matrix.h"
#include "runtime/quant/dequantize_rows.h"

namespace lighter {
namespace {

// Large enough for a product at full speed, and for the attention of large models at once.
constexpr int64_t scratch_limit(bool cuda) {
  return int64_t{cuda ? 80 : 8} << 20;
}

int64_t rows_at_once(int64_t rows, int64_t columns, int64_t element, bool cuda) {
  return std::clamp<int64_t>(scratch_limit(cuda) / (columns * element), 1, rows);
}

at::Tensor few_on_cpu(const at::Tensor& x, const PackedWeight& weight) {
  thread_local QuantizedActivations scratch;  // a few rows of activations
  const at::Tensor input = x.to(at::kFloat).contiguous();
  const at::Tensor out = at::empty({x.size(0), weight.rows}, input.options());
  cpu_matrix_product(weight.encoding, weight.matrix(), weight.data, input.const_data_ptr<float>(), x.size(0),
                     out.mutable_data_ptr<float>(), scratch);
  return out.to(x.scalar_type());
}

}  // namespace

void unpack_rows(Device& device, SliceEncoding encoding, const PackedMatrix& matrix, const std::byte* data,
                 int64_t first, const at::Tensor& out) {
  if (device.is_cuda()) {
    packed_cuda::dequantize_rows(device, encoding, matrix, data, first, out.size(0), out);
    return;
  }
  const DType dtype = out.scalar_type() == at::kFloat ? DType::fp32 : DType::bf16;
  dequantize_rows(encoding, matrix, data, first, out.size(0), dtype, out.mutable_data_ptr(), out.stride(0));
}

at::Tensor packed_linear(Device& device, const at::Tensor& x, const PackedWeight& weight) {
  if (!device.is_cuda() && x.size(0) <= kFewTokens) return few_on_cpu(x, weight);
  const at::Tensor input = device.is_cuda() ? x.to(at::kBFloat16) : x;
  const PackedMatrix matrix = weight.matrix();
  const int64_t step = rows_at_once(weight.rows, weight.columns, input.element_size(), device.is_cuda());
  const at::Tensor scratch = at::empty({step, weight.columns}, input.options());
  const at::Tensor out = at::empty({x.size(0), weight.rows}, x.options());
  for (int64_t first = 0; first < weight.rows; first += step) {
    const int64_t count = std::min(step, weight.rows - first);
    const at::Tensor rows = scratch.narrow(0, 0, count);
    unpack_rows(device, weight.encoding, matrix, weight.data, first, rows);
    at::Tensor part = out.narrow(1, first, count);
    if (part.scalar_type() == input.scalar_type()) {
      at::mm_out(part, input, rows.t());
    } else {
      part.copy_(at::mm(input, rows.t()));
    }
  }
  return out;
}

uint64_t packed_linear_bytes(int64_t rows, int64_t columns, int64_t tokens, DType dtype, bool cuda) {
  const int64_t few = std::min(tokens, kFewTokens) * (columns + rows) * static_cast<int64_t>(sizeof(float));
  if (!cuda && tokens <= kFewTokens) return few;
  const int64_t element = cuda ? 2 : static_cast<int64_t>(dtype_size(dtype));
  const int64_t step = rows_at_once(rows, columns, element, cuda);
  const int64_t converted = cuda && dtype == DType::fp32 ? tokens * columns * element : 0;
  // A step of fewer tokens is possible with any workspace.
  return std::max(cuda ? 0 : few, step * columns * element + tokens * step * element + converted);
}

}  // namespace lighter
