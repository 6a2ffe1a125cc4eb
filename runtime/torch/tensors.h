// Between lighter's memory and libtorch's tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <span>

#include "runtime/device/device.h"
#include "runtime/dtype.h"

namespace lighter {

at::ScalarType scalar_type(DType dtype);
at::Device torch_device(const Device& device);
at::TensorOptions tensor_options(const Device& device, DType dtype);

// A tensor over memory that someone else owns and keeps alive.
at::Tensor view_of(const void* data, at::IntArrayRef shape, const Device& device, DType dtype);
at::Tensor host_view_of(const void* data, at::IntArrayRef shape, DType dtype);

// Host values as a tensor on the device, in its compute stream; see Device::put().
at::Tensor to_device(std::span<const int64_t> values, Device& device);

}  // namespace lighter
