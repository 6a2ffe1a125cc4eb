// What this machine's memory can do at most, measured once in a process and kept: what the micro-benchmarks
// compare themselves with. Not thread-safe.
#pragma once

#include <benchmark/benchmark.h>

#include <chrono>
#include <cstddef>

namespace lighter::bench {

// GB/s (1e9) of reading host memory with so many threads, from a region larger than the caches.
double host_read_ceiling(int threads);
// GB/s of a memcpy of one thread between two regions larger than the caches, each byte counted once.
double host_copy_ceiling();

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  }

 private:
  const std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

// Counters of a benchmark that has moved `bytes` an iteration in all its iterations, which took so many
// seconds: GB/s, and the share of the ceiling.
void report_rate(benchmark::State& state, double bytes, double ceiling_gb_per_s, double seconds);

}  // namespace lighter::bench
