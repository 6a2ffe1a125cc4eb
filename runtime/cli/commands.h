// The commands of the lighter program. Each returns an exit code.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace lighter::cli {

struct CommonOptions {
  std::string config;
  std::vector<std::string> overrides;  // key.path=value
  bool json = false;
};

// Text or ids, not both.
struct PromptOptions {
  std::optional<std::string> text;
  std::vector<long long> ids;
  bool chat = false;   // put the text into the model's chat format
  std::string system;  // message, with chat
};

struct RunOptions {
  CommonOptions common;
  PromptOptions prompt;
  long long max_tokens = -1;  // -1: as configured
  int logprobs = 0;
};

struct PlanOptions {
  CommonOptions common;
  std::string calibration;  // a file, of whatever machine; empty: this machine's
};

struct CalibrateOptions {
  CommonOptions common;
  std::string out;  // a file; empty: where `lighter plan` looks
};

struct EvalOptions {
  CommonOptions common;
  std::string text;       // a file
  long long tokens = -1;  // of it, from its beginning; -1: all
};

struct QuantizeOptions {
  CommonOptions common;
  std::string text;       // a file
  std::string out;        // a folder
  long long tokens = -1;  // of the text, from its beginning; -1: all
};

struct TraceOptions {
  CommonOptions common;
  std::string out;   // a file
  std::string text;  // a file; else a prompt
  long long tokens = -1;
  PromptOptions prompt;
  long long max_tokens = -1;  // -1: as configured
};

struct ReplayOptions {
  std::string trace;  // a file
  std::string policy = "all";
  std::vector<double> resident;  // shares; empty: a few
  int prefetch_depth = -1;       // -1: all that the trace has; 0: none
  bool json = false;
};

struct BenchOptions {
  std::string sweep;  // a file
  std::string out;    // a folder
  bool resume = false;
  bool json = false;
};

struct CompareOptions {
  std::string before, after;  // results.json files
  bool json = false;
};

int run_command(const RunOptions& options);
int plan_command(const PlanOptions& options);
int calibrate_command(const CalibrateOptions& options);
int eval_command(const EvalOptions& options);
int quantize_command(const QuantizeOptions& options);
int trace_command(const TraceOptions& options);
int replay_command(const ReplayOptions& options);
// In bench/.
int bench_command(const BenchOptions& options);
int compare_command(const CompareOptions& options);

}  // namespace lighter::cli
