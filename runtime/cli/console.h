// What the command line shows on stderr: log, progress with an ETA, and the reaction to Ctrl-C.
#pragma once

#include <atomic>
#include <chrono>

#include "runtime/progress.h"

namespace lighter::cli {

// Set by Ctrl-C. The first one ends the work after the step at hand; a second one ends the process.
const std::atomic<bool>& interrupted();
void catch_ctrl_c();
// What the libraries have to say goes to stderr, and over a progress line that is being shown.
void log_to_stderr();

enum class ProgressUnit { bytes, tokens };

// One line, rewritten in place on a terminal and a line every few seconds elsewhere. Throws Interrupted after
// Ctrl-C.
class ProgressLine {
 public:
  explicit ProgressLine(ProgressUnit unit = ProgressUnit::bytes);
  ~ProgressLine();
  void operator()(const std::string& what, uint64_t done, uint64_t total);
  void finish();

 private:
  using Clock = std::chrono::steady_clock;

  std::string amount(double done) const;
  void print(const std::string& line);

  const ProgressUnit unit_;
  const bool terminal_;
  std::string what_;
  Clock::time_point begin_;
  Clock::time_point shown_;
  bool open_ = false;
};

}  // namespace lighter::cli
