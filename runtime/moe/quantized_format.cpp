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

  ExpertInput prepare(Device& device, const at::Tensor& x) const override {
    ExpertInput input{x.contiguous(), {}, {}, {}, {}};
    if (device.is_cuda()) {
      quantized_cuda::prepare(device, shape_, encoding_, input);
    } else {
      input.x = input.x.to(at::kFloat);
    }
    return input;
  }

  void accumulate(Device& device, const std::byte* slice, const ExpertInput& input,
                  at::Tensor& sum) const override {
    if (device.is_cuda()) {
      quantized_cuda::accumulate(device, shape_, encoding_, slice, input, sum);
      return;
    }
    thread_local CpuScratch scratch;  // kept from slice to slice; a few rows of activations
    cpu_.accumulate(slice, input.x.const_data_ptr<float>(), input.x.size(0), sum.mutable_data_ptr<float>(),
                    scratch, CpuThreads::tbb);
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
