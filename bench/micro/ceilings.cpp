#include "bench/micro/ceilings.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <map>
#include <vector>

#include "offload/cpu_rates.h"

namespace lighter::bench {
namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kRegion = size_t{256} << 20;
constexpr int kRounds = 5;

struct alignas(64) Line {
  std::byte bytes[64];
};

std::byte* memory_of(int which) {
  static std::map<int, std::vector<Line>> regions;
  auto& lines = regions[which];
  if (lines.empty()) {
    lines.resize(kRegion / sizeof(Line));
    offload::fill_with_weights(lines.front().bytes, kRegion, 1);
  }
  return lines.front().bytes;
}

template <typename Work>
double best_gb_per_s(Work work) {
  double best = 0;
  for (int i = 0; i < kRounds; ++i) {
    const auto begin = Clock::now();
    work();
    best = std::max(best, static_cast<double>(kRegion) /
                              std::chrono::duration<double>(Clock::now() - begin).count() / 1e9);
  }
  return best;
}

}  // namespace

double host_read_ceiling(int threads) {
  static std::map<int, double> known;
  if (const auto found = known.find(threads); found != known.end()) return found->second;
  double most = 0;
  for (int i = 0; i < kRounds; ++i) {
    most = std::max(most, offload::host_read_rate(memory_of(0), kRegion, threads));
  }
  return known[threads] = most;
}

double host_copy_ceiling() {
  static const double known = best_gb_per_s([] { std::memcpy(memory_of(1), memory_of(0), kRegion); });
  return known;
}

void report_rate(benchmark::State& state, double bytes, double ceiling_gb_per_s, double seconds) {
  const double gb_per_s = bytes * static_cast<double>(state.iterations()) / seconds / 1e9;
  state.counters["GB/s"] = gb_per_s;
  state.counters["of_ceiling"] = gb_per_s / ceiling_gb_per_s;
}

}  // namespace lighter::bench
