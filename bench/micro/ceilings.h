// What this machine's memory can do at most, measured once in a process and kept: what the micro-benchmarks
// compare themselves with. Not thread-safe.
#pragma once

#include <benchmark/benchmark.h>

#include <cstddef>

namespace lighter::bench {

// GB/s (1e9) of reading host memory with so many threads, from a region larger than the caches.
double host_read_ceiling(int threads);
// GB/s of a memcpy of one thread between two regions larger than the caches, each byte counted once.
double host_copy_ceiling();

// Counters of a benchmark that has moved `bytes` an iteration in all its iterations: GB/s, and the share of
// the ceiling.
void report_rate(benchmark::State& state, double bytes, double ceiling_gb_per_s);

}  // namespace lighter::bench
