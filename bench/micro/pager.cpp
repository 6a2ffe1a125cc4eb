// What SlicePager itself costs: with slices so small that their bytes do not count, the time a slice takes;
// with slices of the usual size, its copies beside a plain memcpy. On the CPU device, which needs no GPU.
#include <memory>
#include <numeric>
#include <random>

#include "bench/micro/ceilings.h"
#include "offload/slice_pager.h"

namespace lighter::bench {
namespace {

using offload::PagerOptions;
using offload::SlicePager;

class SameBytes : public SliceSource {
 public:
  explicit SameBytes(uint64_t slice_bytes) : slice_bytes_(slice_bytes) {}
  void read_expert(ExpertId expert, std::span<std::byte* const> slices) const override {
    for (std::byte* slice : slices) std::fill_n(slice, slice_bytes_, static_cast<std::byte>(expert.expert));
  }

 private:
  const uint64_t slice_bytes_;
};

constexpr uint64_t kRoom = uint64_t{4} << 30;

struct Paged {
  Paged(const ExpertGrid& shape, const PagerOptions& options)
      : grid(shape), device(make_cpu_device(kRoom, kRoom)), pager(*device, grid, options) {
    pager.load(SameBytes(grid.slice_bytes), kNoProgress);
  }

  // One step of one token.
  void step() {
    for (int layer = 0; layer < grid.layers; ++layer) {
      const int expert = static_cast<int>(engine() % static_cast<unsigned>(grid.experts));
      pager.visit(layer, std::span(&expert, 1), false, {{}, [] {}, [](int, int, std::span<const std::byte* const>) {}});
    }
    device->compute_stream().synchronize();
    pager.between_steps();
  }

  const ExpertGrid grid;
  std::unique_ptr<Device> device;
  SlicePager pager;
  std::mt19937 engine{3};
};

PagerOptions options_for(const ExpertGrid& grid, double resident) {
  PagerOptions options;
  const int slots = static_cast<int>(resident * static_cast<double>(grid.slices_per_layer()));
  options.residents_per_layer.assign(static_cast<size_t>(grid.layers), slots);
  options.spare_slots = 2 * grid.slices;
  options.prefetch = false;
  return options;
}

// resident: percent. The time is that of a slice.
void pager_overhead(benchmark::State& state) {
  const ExpertGrid grid{48, 16, 16, 4096};
  Paged paged(grid, options_for(grid, static_cast<double>(state.range(0)) / 100));
  for (auto _ : state) paged.step();
  const double slices =
      static_cast<double>(grid.layers) * grid.slices * static_cast<double>(state.iterations());
  state.counters["s_per_slice"] =
      benchmark::Counter(slices, benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
  state.counters["hit_rate"] = paged.pager.counters().hit_rate();
}
BENCHMARK(pager_overhead)
    ->ArgName("resident")
    ->Arg(100)
    ->Arg(50)
    ->Arg(0)
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

void pager_copies(benchmark::State& state) {
  const ExpertGrid grid{4, 8, 4, uint64_t{4} << 20};
  Paged paged(grid, options_for(grid, 0));
  for (int i = 0; i < 4; ++i) paged.step();  // touches every page
  const Stopwatch watch;
  for (auto _ : state) paged.step();
  const double seconds = watch.seconds();
  report_rate(state, static_cast<double>(grid.layers) * static_cast<double>(grid.expert_bytes()),
              host_copy_ceiling(), seconds);
}
BENCHMARK(pager_copies)->UseRealTime()->Unit(benchmark::kMillisecond);

// Host → device copies as the transfer engine issues them.
void device_copy(benchmark::State& state) {
  const auto bytes = static_cast<size_t>(state.range(0)) << 10;
  const size_t count = std::max<size_t>(1, (size_t{256} << 20) / bytes);
  const auto device = make_cpu_device(kRoom, kRoom);
  const Buffer host = device->allocate_host(count * bytes, "copies"),
               arena = device->allocate(count * bytes, "copies");
  std::fill_n(host.data(), host.bytes(), std::byte{1});
  const auto stream = device->new_copy_stream();
  size_t next = 0;
  const Stopwatch watch;
  for (auto _ : state) {
    stream->copy(arena.data() + next * bytes, host.data() + next * bytes, bytes);
    stream->synchronize();
    next = (next + 1) % count;
  }
  const double seconds = watch.seconds();
  report_rate(state, static_cast<double>(bytes), host_copy_ceiling(), seconds);
}
BENCHMARK(device_copy)
    ->ArgName("KiB")
    ->Arg(256)
    ->Arg(2048)
    ->Arg(8192)
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace lighter::bench
