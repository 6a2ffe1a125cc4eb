#include <ATen/ops/zeros.h>

#include "runtime/moe/quantized_cuda.h"
#include "runtime/moe/slice_format.h"
#include "runtime/quant/cpu_slice.h"

namespace lighter {
namespace {

class QuantizedFormat : public SliceFormat {
 public:
  QuantizedFormat(SliceShape shape, SliceEncoding encoding)
      : shape_(shape), encoding_(encoding), cpu_(encoding, shape.hidden, shape.width) {}

  uint64_t slice_bytes() const override { return cpu_.layout().bytes; }

  RoutedInput prepare(Device& device, const at::Tensor& x, std::span<const RowRange> experts,
                      int slices) const override {
    RoutedInput input;
    input.x = x.contiguous();
    input.sum = at::zeros(x.sizes(), x.options().dtype(at::kFloat));
    if (device.is_cuda()) {
      quantized_cuda::prepare(device, shape_, encoding_, experts, slices, input);
    } else {
      input.x = input.x.to(at::kFloat);
    }
    return input;
  }

  void accumulate(Device& device, int first, std::span<const std::byte* const> slices,
                  const RoutedInput& input, RowRange rows) const override {
    if (device.is_cuda()) {
      quantized_cuda::accumulate(device, shape_, encoding_, first, slices, input, rows);
      return;
    }
    thread_local CpuScratch scratch;  // kept from slice to slice; a few rows of activations
    const int64_t at = rows.first * shape_.hidden;
    for (const std::byte* slice : slices) {
      cpu_.accumulate(slice, input.x.const_data_ptr<float>() + at, rows.count,
                      input.sum.mutable_data_ptr<float>() + at, scratch, CpuThreads::tbb);
    }
  }

  void finish(Device& device, const RoutedInput& input, RowRange rows) const override {
    if (device.is_cuda()) quantized_cuda::finish(input, rows);
  }

 private:
  SliceShape shape_;
  SliceEncoding encoding_;
  CpuSliceKernel cpu_;
};

}  // namespace

std::unique_ptr<SliceFormat> make_quantized_format(SliceShape shape, SliceEncoding encoding) {
  return std::make_unique<QuantizedFormat>(shape, encoding);
}

}  // namespace lighter
