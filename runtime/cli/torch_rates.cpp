#include "runtime/cli/torch_rates.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "runtime/torch/tensors.h"
#include "runtime/torch/torch_scope.h"

namespace lighter::cli {
namespace {

using Clock = std::chrono::steady_clock;

// Seconds that `work` takes at best.
template <typename Work>
double best_seconds(Device& device, const Work& work) {
  double least = 1e9;
  work();  // libraries load and choose their kernels
  device.compute_stream().synchronize();
  for (int i = 0; i < 5; ++i) {
    const auto begin = Clock::now();
    work();
    device.compute_stream().synchronize();
    least = std::min(least, std::chrono::duration<double>(Clock::now() - begin).count());
  }
  return least;
}

}  // namespace

TorchRates measure_torch_rates(Device& device, DType dtype, int threads) {
  const TorchScope scope(device, kTorchRatesBytes, threads);
  const auto options = tensor_options(device, dtype);
  // Enough matrices that no cache holds them all.
  constexpr int64_t kColumns = 4096;
  const int64_t rows = device.is_cuda() ? 8192 : 2048, tokens = device.is_cuda() ? 8192 : 256;
  std::vector<at::Tensor> matrices;
  for (int i = 0; i < 4; ++i) matrices.push_back(at::full({rows, kColumns}, 0.01, options));
  const double weights = 4.0 * static_cast<double>(rows * kColumns);
  const auto pass = [&](const at::Tensor& x) {
    return best_seconds(device, [&] {
      for (const at::Tensor& matrix : matrices) at::linear(x, matrix);
    });
  };
  TorchRates rates;
  rates.dense_gb_per_s =
      weights * static_cast<double>(dtype_size(dtype)) / pass(at::full({1, kColumns}, 0.5, options)) * 1e-9;
  rates.tensor_tflops =
      2 * weights * static_cast<double>(tokens) / pass(at::full({tokens, kColumns}, 0.5, options)) * 1e-12;
  return rates;
}

}  // namespace lighter::cli
