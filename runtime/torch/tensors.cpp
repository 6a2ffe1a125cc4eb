#include "runtime/torch/tensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>

namespace lighter {

at::ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::fp32:
      return at::kFloat;
    case DType::bf16:
      return at::kBFloat16;
    case DType::fp16:
      return at::kHalf;
  }
  return at::kFloat;
}

at::Device torch_device(const Device& device) {
  return device.is_cuda() ? at::Device(at::kCUDA, static_cast<at::DeviceIndex>(device.index()))
                          : at::Device(at::kCPU);
}

at::TensorOptions tensor_options(const Device& device, DType dtype) {
  return at::TensorOptions().device(torch_device(device)).dtype(scalar_type(dtype));
}

at::Tensor view_of(const void* data, at::IntArrayRef shape, const Device& device, DType dtype) {
  const auto options = tensor_options(device, dtype);
  return at::from_blob(
      const_cast<void*>(data), shape, [](void*) {}, options, options.device());
}

at::Tensor host_view_of(const void* data, at::IntArrayRef shape, DType dtype) {
  return at::from_blob(const_cast<void*>(data), shape, at::TensorOptions().dtype(scalar_type(dtype)));
}

at::Tensor to_device(std::span<const int64_t> values, Device& device) {
  constexpr size_t most_put = 16384;  // beyond, launches take longer than a copy
  const auto count = static_cast<int64_t>(values.size());
  if (device.is_cuda() && values.size() > most_put) {
    const at::Tensor host = at::empty({count}, at::TensorOptions(at::kLong).pinned_memory(true));
    std::ranges::copy(values, host.mutable_data_ptr<int64_t>());
    return host.to(torch_device(device), true);
  }
  const at::Tensor tensor = at::empty({count}, at::TensorOptions(at::kLong).device(torch_device(device)));
  device.put(tensor.mutable_data_ptr<int64_t>(), values);
  return tensor;
}

}  // namespace lighter
