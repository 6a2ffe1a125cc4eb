#include <cstdio>
#include <cstdlib>

#include "bench/report.h"
#include "bench/results_file.h"
#include "bench/runner.h"
#include "bench/session_workbench.h"
#include "bench/table.h"
#include "runtime/cli/commands.h"
#include "runtime/cli/console.h"
#include "runtime/error.h"

namespace lighter::cli {
namespace {

constexpr int kFailureExit = 1;
constexpr int kInterruptedExit = 130;  // as shells report Ctrl-C

void make_folder(const std::filesystem::path& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw ConfigError("--out " + folder.string() + ": cannot be made: " + error.message());
}

void write_reports(const std::filesystem::path& folder, const bench::Json& results) {
  bench::write_atomically(folder / "results.csv", bench::results_csv(results));
  bench::write_atomically(folder / "table.md", bench::results_markdown(results));
  bench::write_atomically(folder / "report.html", bench::results_html(results));
}

}  // namespace

int bench_command(const BenchOptions& options) {
  // The recorder of steps reports a machine without GPUs as an error of its own.
  setenv("KINETO_LOG_LEVEL", "5", 0);
  // Taken down after the first recorded step, CUPTI would not come up for the next one beside CUDA graphs.
  setenv("TEARDOWN_CUPTI", "0", 0);
  const bench::Sweep sweep = bench::load_sweep(options.sweep);
  const std::filesystem::path folder = options.out;
  ProgressLine progress;
  bench::SessionWorkbench workbench(sweep, interrupted(), std::ref(progress));
  make_folder(folder);
  bench::RunnerOptions runner;
  runner.results = folder / "results.json";
  runner.resume = options.resume;
  runner.interrupted = &interrupted();
  runner.say = [&](const std::string& text) {
    progress.finish();
    std::fprintf(stderr, "%s\n", text.c_str());
  };
  runner.saved = [&](const bench::Json& results) { write_reports(folder, results); };
  const bench::Outcome outcome = bench::run_sweep(sweep, workbench, runner);
  if (options.json) {
    std::printf("%s\n", outcome.results.dump(2, ' ', false, bench::Json::error_handler_t::replace).c_str());
  }
  std::fprintf(stderr,
               "points: %d measured, %d taken over, %d failed; %s holds results.json, results.csv, table.md "
               "and report.html\n",
               outcome.measured, outcome.taken_over, outcome.failed, folder.string().c_str());
  for (const std::string& remark : bench::results_remarks(outcome.results))
    std::fprintf(stderr, "%s\n", remark.c_str());
  if (outcome.interrupted) {
    std::fprintf(stderr, "interrupted; --resume goes on\n");
    return kInterruptedExit;
  }
  // A point that fails is a result; that all of them do is none.
  if (outcome.measured + outcome.taken_over > 0) return 0;
  std::fprintf(stderr, "nothing was measured\n");
  return kFailureExit;
}

}  // namespace lighter::cli
