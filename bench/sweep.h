// A sweep: what `lighter bench` measures, in which order. Read from YAML with the machinery of
// runtime/config, and expanded at once, so that a mistake anywhere in it is found before anything is loaded.
//
//   baseline (first) → half of the points → baseline (middle) → the other half → baseline (last)
//
// The baseline is measured with every workload that a point has. Pure values; thread-safe.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "offload/bound.h"

namespace lighter::bench {

// What is asked of a loaded model: batch sequences of prompt_tokens each, generated_tokens made for each.
struct Workload {
  int64_t prompt_tokens = 16;
  int64_t generated_tokens = 32;
  int batch = 1;

  bool operator==(const Workload&) const = default;
};

// Where the prompts' tokens and the routing come from.
struct Inputs {
  std::filesystem::path prompt_file;  // text; empty: random ids
  uint64_t prompt_seed = 0;           // of the random ids
  std::filesystem::path trace;        // recorded routing, for synthetic weights; empty: as configured
};

enum class Round { none, first, middle, last };  // none: not the baseline
const char* round_name(Round round);

struct Point {
  std::string model;                   // its name in the sweep
  std::filesystem::path config;        // a file for `lighter run`
  std::vector<std::string> overrides;  // key.path=value, in order
  nlohmann::ordered_json settings =
      nlohmann::ordered_json::object();  // the axes' values, and "set" of its block
  Workload workload;
  Round round = Round::none;
  std::string label;  // for people: what tells it from the sweep's other points
  std::string key;    // the same in every sweep that has this model, these settings and this workload
  std::string id;     // a hash of everything that the result depends on, the files' contents included
};

// Llama-3.1-8B with synthetic weights, wholly in memory, on the first model's device and within its budgets.
inline constexpr char kUsualBaseline[] = "Llama-3.1-8B bf16";

// Ceilings of the machine that the sweep gives; absent: measured where that is possible.
using offload::Rates;

struct Sweep {
  std::string name;
  std::string baseline;  // a model's name; kUsualBaseline where the file names none
  int warmup = 1;
  int repeats = 3;
  Inputs inputs;
  Rates rates;
  std::vector<Point> points;  // in the order in which they are measured
};

// Paths in the file are relative to its folder. Throws ConfigError: "file:line:column: what is wrong".
Sweep load_sweep(const std::filesystem::path& file);

}  // namespace lighter::bench
