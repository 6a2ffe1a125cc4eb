// The CUDA kernels and copies, in the GPU's own time. Ceilings are measured first: device memory by a copy
// within it (bytes read and bytes written), the link by one large page-locked copy. Skipped where there is no
// GPU.
#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "bench/micro/ceilings.h"
#include "runtime/kernels/quant_slice.h"

namespace lighter::bench {
namespace {

constexpr size_t kRegion = size_t{1} << 30;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

bool has_gpu() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

struct Memory {
  Memory(size_t bytes, bool pinned) : pinned_(pinned) {
    check(pinned ? cudaMallocHost(&data, bytes) : cudaMalloc(&data, bytes));
    if (pinned) return;
    check(cudaMemset(data, 0, bytes));
  }
  ~Memory() { pinned_ ? cudaFreeHost(data) : cudaFree(data); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  std::byte* bytes() const { return static_cast<std::byte*>(data); }
  void* data = nullptr;

 private:
  const bool pinned_;
};

class Timer {
 public:
  Timer() {
    check(cudaEventCreate(&begin_));
    check(cudaEventCreate(&end_));
  }
  ~Timer() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  // Seconds that the work takes on the default stream.
  double operator()(const std::function<void()>& work) const {
    check(cudaEventRecord(begin_));
    work();
    check(cudaEventRecord(end_));
    check(cudaEventSynchronize(end_));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, begin_, end_));
    return milliseconds / 1e3;
  }

 private:
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

double best_gb_per_s(double bytes, const std::function<void()>& work) {
  const Timer timer;
  double best = 0;
  for (int i = 0; i < 7; ++i) best = std::max(best, bytes / timer(work) / 1e9);
  return best;
}

double device_ceiling() {
  static const double known = [] {
    const Memory from(kRegion, false), to(kRegion, false);
    return best_gb_per_s(2.0 * kRegion,
                         [&] { check(cudaMemcpyAsync(to.data, from.data, kRegion, cudaMemcpyDefault)); });
  }();
  return known;
}

double link_ceiling() {
  static const double known = [] {
    const Memory from(kRegion, true), to(kRegion, false);
    return best_gb_per_s(kRegion,
                         [&] { check(cudaMemcpyAsync(to.data, from.data, kRegion, cudaMemcpyDefault)); });
  }();
  return known;
}

// One expert of Scout a call, from more slices than the L2 cache holds.
void gpu_slices(benchmark::State& state, kernels::Encoding encoding, bool pinned) {
  if (!has_gpu()) return state.SkipWithError("no GPU");
  const kernels::QuantSliceShape shape{5120, 512};
  constexpr int kSlices = 16;
  const int tokens = static_cast<int>(state.range(0));
  const uint64_t slice_bytes = kernels::quant_slice_bytes(encoding, shape);
  const size_t experts = kRegion / (slice_bytes * kSlices);
  const Memory weights(experts * kSlices * slice_bytes, pinned);
  if (pinned) std::fill_n(weights.bytes(), experts * kSlices * slice_bytes, std::byte{0});
  const Memory x(tokens * shape.hidden * 4, false), q(tokens * shape.hidden, false),
      scales(tokens * shape.hidden, false), sums(tokens * shape.hidden, false),
      sum(tokens * shape.hidden * 4, false),
      workspace(kernels::workspace_bytes(encoding, shape, kSlices, tokens), false);
  const kernels::QuantizedActivations activations{
      static_cast<int8_t*>(q.data), static_cast<float*>(scales.data), static_cast<float*>(sums.data)};
  kernels::quantize_activations(encoding, kernels::ActivationType::fp32, tokens, shape.hidden, x.data,
                                activations, nullptr);
  const double ceiling = pinned ? link_ceiling() : device_ceiling();
  const Timer timer;
  double seconds = 0;
  size_t expert = 0;
  for (auto _ : state) {
    std::vector<const void*> addresses;
    for (int i = 0; i < kSlices; ++i)
      addresses.push_back(weights.bytes() + (expert * kSlices + i) * slice_bytes);
    kernels::SliceList list;
    list.on_host = addresses.data();
    list.count = kSlices;
    const double took = timer([&] {
      kernels::slices_forward(encoding, shape, list, tokens, activations, workspace.data,
                              static_cast<float*>(sum.data), nullptr);
    });
    state.SetIterationTime(took);
    seconds += took;
    expert = (expert + 1) % experts;
  }
  report_rate(state, static_cast<double>(kSlices) * static_cast<double>(slice_bytes), ceiling, seconds);
}
void token_counts(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgName("tokens")->Arg(1)->Arg(4)->Arg(16)->UseManualTime()->Unit(benchmark::kMicrosecond);
}
BENCHMARK_CAPTURE(gpu_slices, int8_device, kernels::Encoding::int8, false)->Apply(token_counts);
BENCHMARK_CAPTURE(gpu_slices, int4_device, kernels::Encoding::int4, false)->Apply(token_counts);
BENCHMARK_CAPTURE(gpu_slices, int8_pinned, kernels::Encoding::int8, true)->Apply(token_counts);
BENCHMARK_CAPTURE(gpu_slices, int4_pinned, kernels::Encoding::int4, true)->Apply(token_counts);

void gpu_copy(benchmark::State& state) {
  if (!has_gpu()) return state.SkipWithError("no GPU");
  const auto bytes = static_cast<size_t>(state.range(0)) << 10;
  const Memory from(kRegion, true), to(kRegion, false);
  const double ceiling = link_ceiling();
  const Timer timer;
  constexpr int kCopies = 16;
  double seconds = 0;
  size_t at = 0;
  for (auto _ : state) {
    const double took = timer([&] {
      for (int i = 0; i < kCopies; ++i) {
        check(cudaMemcpyAsync(to.bytes() + at, from.bytes() + at, bytes, cudaMemcpyDefault));
        at = at + 2 * bytes <= kRegion ? at + bytes : 0;
      }
    });
    state.SetIterationTime(took);
    seconds += took;
  }
  report_rate(state, static_cast<double>(kCopies) * static_cast<double>(bytes), ceiling, seconds);
}
BENCHMARK(gpu_copy)
    ->ArgName("KiB")
    ->Arg(512)
    ->Arg(1024)
    ->Arg(2048)
    ->Arg(4096)
    ->Arg(8192)
    ->Arg(65536)
    ->UseManualTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace lighter::bench
