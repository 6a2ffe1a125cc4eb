// Rotary position embedding. Thread-safe after construction.
#pragma once

#include <ATen/core/Tensor.h>

#include "models/model_spec.h"
#include "runtime/device/device.h"

namespace lighter::models {

// Inverse wavelengths after scaling, [head_dim / 2], computed in fp32 as transformers does.
std::vector<float> inverse_frequencies(const RopeSpec& rope, int64_t head_dim);

class Rope {
 public:
  Rope(const RopeSpec& spec, int64_t head_dim, const Device& device);

  // Cosines and sines for a step's positions, made once and used by every layer.
  struct Angles {
    at::Tensor cos, sin;  // [tokens, 1, head_dim / 2] fp32
  };
  // positions: [tokens] int64 on the device
  Angles angles(const at::Tensor& positions) const;

  // x: [tokens, heads, head_dim]; returns the same shape and dtype.
  at::Tensor rotate(const at::Tensor& x, const Angles& angles) const;

 private:
  const bool interleaved_;
  at::Tensor inverse_frequencies_;  // fp32 on the device
};

}  // namespace lighter::models
