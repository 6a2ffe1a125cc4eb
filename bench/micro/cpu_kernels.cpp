// The CPU's slice kernels and the quantization of activations, on Scout's width. Weights are read from more
// slices than the caches hold; the ceiling is reading memory with as many threads.
#include <tbb/task_arena.h>

#include <random>
#include <thread>

#include "bench/micro/ceilings.h"
#include "runtime/quant/cpu_slice.h"

namespace lighter::bench {
namespace {

constexpr int64_t kHidden = 5120, kWidth = 512;
constexpr uint64_t kWeights = uint64_t{256} << 20;

// Random bytes but for the scales, which are made harmless: 2^-7 in fp16.
std::vector<std::byte> random_slices(const PackedSliceLayout& layout, size_t count) {
  std::vector<std::byte> slices(layout.bytes * count);
  std::mt19937_64 engine(1);
  for (size_t i = 0; i + 8 <= slices.size(); i += 8) *reinterpret_cast<uint64_t*>(&slices[i]) = engine();
  for (size_t slice = 0; slice < count; ++slice) {
    auto* scales =
        reinterpret_cast<uint16_t*>(&slices[slice * layout.bytes + layout[SliceMatrix::gate].scales_at]);
    std::fill(scales, reinterpret_cast<uint16_t*>(slices.data() + (slice + 1) * layout.bytes),
              uint16_t{0x2000});
  }
  return slices;
}

std::vector<float> random_values(int64_t count) {
  std::mt19937 engine(2);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(engine);
  return values;
}

void cpu_slice(benchmark::State& state, SliceEncoding encoding) {
  const auto tokens = state.range(0);
  const int threads = static_cast<int>(state.range(1));
  const CpuSliceKernel kernel(encoding, kHidden, kWidth);
  const uint64_t bytes = kernel.layout().bytes;
  const size_t count = kWeights / bytes;
  const auto slices = random_slices(kernel.layout(), count);
  const auto x = random_values(tokens * kHidden);
  std::vector<float> sum(x.size());
  CpuScratch scratch;
  tbb::task_arena arena(threads);
  size_t next = 0;
  const Stopwatch watch;
  for (auto _ : state) {
    arena.execute([&] {
      kernel.accumulate(slices.data() + next * bytes, x.data(), tokens, sum.data(), scratch,
                        threads == 1 ? CpuThreads::calling : CpuThreads::tbb);
    });
    next = (next + 1) % count;
  }
  const double seconds = watch.seconds();
  benchmark::DoNotOptimize(sum.data());
  report_rate(state, static_cast<double>(bytes), host_read_ceiling(threads), seconds);
}

void thread_counts(benchmark::internal::Benchmark* benchmark) {
  const auto cores = static_cast<int64_t>(std::max(1u, std::thread::hardware_concurrency()));
  benchmark->ArgNames({"tokens", "threads"})->UseRealTime()->Unit(benchmark::kMicrosecond);
  for (const int64_t tokens : {1, 4, 16}) {
    benchmark->Args({tokens, 1});
    if (cores > 1) benchmark->Args({tokens, cores});
  }
}
BENCHMARK_CAPTURE(cpu_slice, int8, SliceEncoding::int8)->Apply(thread_counts);
BENCHMARK_CAPTURE(cpu_slice, int4, SliceEncoding::int4)->Apply(thread_counts);

// 4 bytes of a value are read; it stays in the caches, so the ceiling is only a yardstick.
void quantize_activations(benchmark::State& state, SliceEncoding encoding) {
  const auto tokens = state.range(0);
  const auto x = random_values(tokens * kHidden);
  QuantizedActivations quantized;
  const Stopwatch watch;
  for (auto _ : state) quantized.assign(encoding, x.data(), tokens, kHidden);
  const double seconds = watch.seconds();
  benchmark::DoNotOptimize(quantized.values(0));
  report_rate(state, static_cast<double>(x.size() * sizeof(float)), host_read_ceiling(1), seconds);
}
BENCHMARK_CAPTURE(quantize_activations, int8, SliceEncoding::int8)
    ->ArgName("tokens")
    ->Arg(1)
    ->Arg(16)
    ->UseRealTime();
BENCHMARK_CAPTURE(quantize_activations, int4, SliceEncoding::int4)
    ->ArgName("tokens")
    ->Arg(1)
    ->Arg(16)
    ->UseRealTime();

}  // namespace
}  // namespace lighter::bench
