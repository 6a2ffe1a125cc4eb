// The commands of the lighter program. Each returns an exit code.
#pragma once

#include <string>
#include <vector>

namespace lighter::cli {

struct CommonOptions {
  std::string config;
  std::vector<std::string> overrides;  // key.path=value
  bool json = false;
};

struct RunOptions {
  CommonOptions common;
  std::string prompt;
  bool prompt_given = false;
  std::vector<long long> prompt_ids;
  bool chat = false;
  std::string system;
  long long max_tokens = -1;  // -1: as configured
  int logprobs = 0;
};

struct EvalOptions {
  CommonOptions common;
  std::string text;       // a file
  long long tokens = -1;  // of it, from its beginning; -1: all
};

struct TraceOptions {
  CommonOptions common;
  std::string out;   // a file
  std::string text;  // a file; else a prompt
  long long tokens = -1;
  std::string prompt;
  std::vector<long long> prompt_ids;
  long long max_tokens = -1;  // -1: as configured
};

struct ReplayOptions {
  std::string trace;  // a file
  std::string policy = "all";
  std::vector<double> resident;  // shares; empty: a few
  int prefetch_depth = -1;       // -1: all that the trace has; 0: none
  bool json = false;
};

int run_command(const RunOptions& options);
int plan_command(const CommonOptions& options);
int eval_command(const EvalOptions& options);
int trace_command(const TraceOptions& options);
int replay_command(const ReplayOptions& options);

}  // namespace lighter::cli
