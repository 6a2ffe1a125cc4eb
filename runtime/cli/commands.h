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

int run_command(const RunOptions& options);
int plan_command(const CommonOptions& options);

}  // namespace lighter::cli
