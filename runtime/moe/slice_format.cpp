#include "runtime/moe/slice_format.h"

#include <ATen/ops/zeros.h>

#include <algorithm>

#include "runtime/error.h"
#include "runtime/moe/swiglu.h"
#include "runtime/torch/tensors.h"

namespace lighter {
namespace {

class DenseFormat : public SliceFormat {
 public:
  DenseFormat(SliceShape shape, DType dtype) : shape_(shape), dtype_(dtype) {}

  uint64_t slice_bytes() const override { return dense_slice_bytes(shape_, dtype_); }

  RoutedInput prepare(Device&, const at::Tensor& x, std::span<const RowRange>, int) const override {
    RoutedInput input;
    input.x = x.contiguous();
    input.sum = at::zeros(x.sizes(), x.options().dtype(at::kFloat));
    return input;
  }

  void accumulate(Device& device, int, std::span<const std::byte* const> slices, const RoutedInput& input,
                  RowRange rows) const override {
    const auto [hidden, width] = shape_;
    const at::Tensor x = input.x.narrow(0, rows.first, rows.count);
    at::Tensor sum = input.sum.narrow(0, rows.first, rows.count);
    for (const std::byte* slice : slices) {
      const at::Tensor gate_up = view_of(slice, {2 * width, hidden}, device, dtype_);
      const at::Tensor down =
          view_of(slice + 2 * width * hidden * dtype_size(dtype_), {hidden, width}, device, dtype_);
      sum.add_(swiglu(x, gate_up, down));
    }
  }

 private:
  SliceShape shape_;
  DType dtype_;
};

}  // namespace

uint64_t dense_slice_bytes(SliceShape shape, DType dtype) {
  return 3 * static_cast<uint64_t>(shape.hidden) * shape.width * dtype_size(dtype);
}

std::unique_ptr<SliceFormat> make_dense_format(SliceShape shape, DType dtype) {
  return std::make_unique<DenseFormat>(shape, dtype);
}

uint64_t slice_bytes(SliceShape shape, SliceEncoding encoding, DType dtype) {
  return encoding == SliceEncoding::dense ? dense_slice_bytes(shape, dtype)
                                          : packed_slice_bytes(encoding, shape.hidden, shape.width);
}

int64_t default_slice_width(int64_t hidden, int64_t expert_ffn, SliceEncoding encoding, DType dtype) {
  constexpr uint64_t target_bytes = uint64_t{8} << 20;
  constexpr int64_t unit = 256;
  const bool quantized = encoding != SliceEncoding::dense;
  const int64_t most = quantized ? expert_ffn : std::max<int64_t>(1, expert_ffn / 4);
  int64_t best = 0;
  for (int64_t width = 1; width <= most; ++width) {
    if (expert_ffn % width != 0) continue;
    const bool aligned = width % unit == 0 || (!quantized && (expert_ffn % unit != 0 || most < unit));
    if (!aligned) continue;
    if (best == 0 || slice_bytes({hidden, width}, encoding, dtype) <= target_bytes) best = width;
  }
  if (best == 0) {
    throw ConfigError("model.experts: " + std::string(encoding_name(encoding)) +
                      " needs experts whose FFN width is " + "a multiple of 256; this model's is " +
                      std::to_string(expert_ffn));
  }
  return best;
}

}  // namespace lighter
