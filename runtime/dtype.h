// The element types of tensors. Pure values; thread-safe.
#pragma once

#include <cstddef>
#include <string_view>

namespace lighter {

// fp32 and bf16 are computed in; fp16 occurs only as a type that checkpoints are stored in.
enum class DType { fp32, bf16, fp16 };

constexpr std::string_view dtype_name(DType dtype) {
  switch (dtype) {
    case DType::fp32:
      return "fp32";
    case DType::bf16:
      return "bf16";
    case DType::fp16:
      return "fp16";
  }
  return "?";
}

// Bytes of one element.
constexpr std::size_t dtype_size(DType dtype) {
  return dtype == DType::fp32 ? 4 : 2;
}

}  // namespace lighter
