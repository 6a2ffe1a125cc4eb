#include <cstdio>

#include "bench/compare.h"
#include "bench/results_file.h"
#include "runtime/cli/commands.h"

namespace lighter::cli {

int compare_command(const CompareOptions& options) {
  const bench::Json comparison =
      bench::compare_results(bench::read_results(options.before), bench::read_results(options.after));
  const std::string text = options.json ? comparison.dump(2) + "\n" : bench::comparison_markdown(comparison);
  std::fwrite(text.data(), 1, text.size(), stdout);
  return 0;
}

}  // namespace lighter::cli
