#include "models/rope.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>

#include <cmath>
#include <numbers>

#include "runtime/torch/tensors.h"

namespace lighter::models {

std::vector<float> inverse_frequencies(const RopeSpec& rope, int64_t head_dim) {
  std::vector<float> result;
  for (int64_t i = 0; i < head_dim; i += 2) {
    const float exponent = static_cast<float>(i) / static_cast<float>(head_dim);
    const float frequency = 1.0f / std::pow(static_cast<float>(rope.theta), exponent);
    if (!rope.scaling) {
      result.push_back(frequency);
      continue;
    }
    const RopeScaling& s = *rope.scaling;
    const double wavelength = 2 * std::numbers::pi / frequency;
    // The bands are tested first: with low = high the blend between them would divide by zero.
    if (wavelength < s.original_context / s.high_freq_factor) {
      result.push_back(frequency);
    } else if (wavelength > s.original_context / s.low_freq_factor ||
               s.high_freq_factor == s.low_freq_factor) {
      result.push_back(static_cast<float>(frequency / s.factor));
    } else {
      const double blend =
          (s.original_context / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
      result.push_back(static_cast<float>((1 - blend) * frequency / s.factor + blend * frequency));
    }
  }
  return result;
}

Rope::Rope(const RopeSpec& spec, int64_t head_dim, const Device& device) : interleaved_(spec.interleaved) {
  const auto values = inverse_frequencies(spec, head_dim);
  inverse_frequencies_ = host_view_of(values.data(), {static_cast<int64_t>(values.size())}, DType::fp32)
                             .clone()
                             .to(torch_device(device));
}

Rope::Angles Rope::angles(const at::Tensor& positions) const {
  const at::Tensor angle = positions.to(at::kFloat).unsqueeze(1).mul(inverse_frequencies_.unsqueeze(0));
  return {angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)};
}

at::Tensor Rope::rotate(const at::Tensor& x, const Angles& angles) const {
  const int64_t half = x.size(2) / 2;
  if (interleaved_) {
    const at::Tensor pairs = x.to(at::kFloat).reshape({x.size(0), x.size(1), half, 2});
    const at::Tensor a = pairs.select(3, 0);
    const at::Tensor b = pairs.select(3, 1);
    const at::Tensor rotated =
        at::stack({a.mul(angles.cos).sub(b.mul(angles.sin)), a.mul(angles.sin).add(b.mul(angles.cos))}, 3);
    return rotated.reshape(x.sizes()).to(x.scalar_type());
  }
  const at::Tensor cos = angles.cos.to(x.scalar_type());
  const at::Tensor sin = angles.sin.to(x.scalar_type());
  const at::Tensor a = x.narrow(2, 0, half);
  const at::Tensor b = x.narrow(2, half, half);
  return at::cat({a.mul(cos).sub(b.mul(sin)), b.mul(cos).add(a.mul(sin))}, 2);
}

}  // namespace lighter::models
