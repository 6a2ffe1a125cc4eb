// Measures the points of a sweep, one after the other: load, warm up, repeat, record. What one point meets is
// recorded as its result and the next one goes on; after every point the results are whole on disk. Not
// thread-safe.
//
//   each point: (done already → skip) → load → warm-up runs → repeats → results.json
//   when all are done: one step of one point of each model is recorded
//
// Recording comes last because a profiler that has once been on may slow down all that is timed after it.
#pragma once

#include <atomic>
#include <filesystem>
#include <functional>

#include "bench/measure.h"
#include "bench/result.h"

namespace lighter::bench {

struct RunnerOptions {
  std::filesystem::path results;  // the file
  // Takes over the points that the file already holds as measured; those that failed are tried again. Without
  // it an earlier file is replaced if its sweep was finished (earlier_results.h).
  bool resume = false;
  const std::atomic<bool>* interrupted = nullptr;  // may be null
  // After the file was written. May be empty.
  std::function<void(const Json& results)> saved;
  // Before each point (text: "[3/12] scout, int8 …"), and after it (what came out). May be empty.
  std::function<void(const std::string& text)> say;
};

struct Outcome {
  Json results;
  int measured = 0;  // in this run
  int taken_over = 0;
  int failed = 0;
  bool interrupted = false;
};

// Throws ConfigError when results cannot be written or resumed from, or earlier ones would be lost. Ctrl-C is
// an outcome and not thrown.
Outcome run_sweep(const Sweep& sweep, Workbench& bench, const RunnerOptions& options);

}  // namespace lighter::bench
