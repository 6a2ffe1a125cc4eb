#include "bench/micro/ceilings.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <map>
#include <numeric>
#include <thread>
#include <vector>

namespace lighter::bench {
namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kRegion = size_t{256} << 20;
constexpr int kRounds = 5;

std::vector<uint64_t>& region(int which) {
  static std::map<int, std::vector<uint64_t>> regions;
  auto& words = regions[which];
  if (words.empty()) {
    words.resize(kRegion / sizeof(uint64_t));
    std::iota(words.begin(), words.end(), uint64_t{1});
  }
  return words;
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

uint64_t sum_of(const uint64_t* words, size_t count) {
  uint64_t sums[8] = {};
  for (size_t i = 0; i + 8 <= count; i += 8) {
    for (size_t lane = 0; lane < 8; ++lane) sums[lane] += words[i + lane];
  }
  return std::accumulate(std::begin(sums), std::end(sums), uint64_t{0});
}

}  // namespace

double host_read_ceiling(int threads) {
  static std::map<int, double> known;
  if (const auto found = known.find(threads); found != known.end()) return found->second;
  const std::vector<uint64_t>& words = region(0);
  const size_t part = words.size() / static_cast<size_t>(threads);
  return known[threads] = best_gb_per_s([&] {
           std::vector<std::thread> readers;
           for (int i = 0; i < threads; ++i) {
             readers.emplace_back([&, i] {
               benchmark::DoNotOptimize(sum_of(words.data() + static_cast<size_t>(i) * part, part));
             });
           }
           for (std::thread& reader : readers) reader.join();
         });
}

double host_copy_ceiling() {
  static const double known = best_gb_per_s([] { std::memcpy(region(1).data(), region(0).data(), kRegion); });
  return known;
}

void report_rate(benchmark::State& state, double bytes, double ceiling_gb_per_s, double seconds) {
  const double gb_per_s = bytes * static_cast<double>(state.iterations()) / seconds / 1e9;
  state.counters["GB/s"] = gb_per_s;
  state.counters["of_ceiling"] = gb_per_s / ceiling_gb_per_s;
}

}  // namespace lighter::bench
