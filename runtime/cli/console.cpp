#include "runtime/cli/console.h"

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>

#include "runtime/bytes.h"
#include "runtime/error.h"
#include "runtime/units.h"

namespace lighter::cli {
namespace {

std::atomic<bool> ctrl_c{false};

void on_signal(int signal) {
  if (ctrl_c.exchange(true)) _exit(128 + signal);
}

}  // namespace

const std::atomic<bool>& interrupted() {
  return ctrl_c;
}

void catch_ctrl_c() {
  std::signal(SIGINT, on_signal);
  std::signal(SIGTERM, on_signal);
}

void log_to_stderr() {
  const auto logger = spdlog::stderr_logger_mt("lighter");
  logger->set_pattern(isatty(STDERR_FILENO) != 0 ? "\r\033[K%l: %v" : "%l: %v");
  spdlog::set_default_logger(logger);
}

ProgressLine::ProgressLine(ProgressUnit unit) : unit_(unit), terminal_(isatty(STDERR_FILENO) != 0) {}
ProgressLine::~ProgressLine() {
  finish();
}

void ProgressLine::operator()(const std::string& what, uint64_t done, uint64_t total) {
  if (interrupted()) throw Interrupted();
  const auto now = Clock::now();
  if (what != what_) {
    finish();
    what_ = what;
    begin_ = now;
    shown_ = now;
    return;
  }
  const std::chrono::duration<double> since_shown = now - shown_;
  if (since_shown.count() < (terminal_ ? 0.2 : 5) && !(open_ && done == total)) return;
  shown_ = now;
  const double elapsed = std::chrono::duration<double>(now - begin_).count();
  const double rate = static_cast<double>(done) / elapsed;
  print(what + ": " + (unit_ == ProgressUnit::tokens ? std::to_string(done) : format_bytes(done)) + " of " +
        amount(static_cast<double>(total)) + ", " + amount(rate) + "/s, " +
        (done == total ? format_seconds(elapsed)
                       : format_seconds(static_cast<double>(total - done) / rate) + " left"));
}

std::string ProgressLine::amount(double done) const {
  if (unit_ == ProgressUnit::bytes) return format_bytes(static_cast<uint64_t>(done));
  return std::to_string(static_cast<uint64_t>(done)) + " tokens";
}

void ProgressLine::print(const std::string& line) {
  std::fprintf(stderr, terminal_ ? "\r\033[K%s" : "%s\n", line.c_str());
  std::fflush(stderr);
  open_ = terminal_;
}

void ProgressLine::finish() {
  if (open_) std::fputc('\n', stderr);
  open_ = false;
}

}  // namespace lighter::cli
