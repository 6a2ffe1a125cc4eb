#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "runtime/bytes.h"
#include "runtime/cli/commands.h"
#include "runtime/cli/console.h"
#include "runtime/cli/model_config.h"
#include "runtime/cli/quantize.h"
#include "runtime/cli/text_windows.h"
#include "runtime/error.h"
#include "runtime/units.h"

namespace lighter::cli {
namespace {

std::vector<std::vector<int64_t>> sequences_of(const TextWindows& text, int64_t vocab) {
  std::vector<std::vector<int64_t>> sequences;
  for (const TextWindow& window : text.windows) {
    check_ids(window.inputs, vocab);
    sequences.push_back(window.inputs);
  }
  return sequences;
}

}  // namespace

int quantize_command(const QuantizeOptions& options) {
  Config config = load_model_config(options.common.config, options.common.overrides);
  config.memory.sequences = 1;
  const PreparedModel model = prepare(config);
  const bool by_text = needs_text(config, model);
  if (by_text && options.text.empty()) {
    throw ConfigError("int4 is rounded by what a text does in the model; give one with --text");
  }
  if (!by_text && !options.text.empty()) {
    throw ConfigError("nothing is to be in int4, which alone is rounded by a text; leave --text out");
  }
  const auto limit = options.tokens >= 0 ? std::optional<int64_t>(options.tokens) : std::nullopt;
  const TextWindows text = by_text ? load_text_windows(options.text, config, limit) : TextWindows();
  const auto begin = std::chrono::steady_clock::now();
  ProgressLine progress;
  const QuantizeReport report =
      quantize(config, model, sequences_of(text, model.spec.vocab), options.out, std::ref(progress));
  progress.finish();
  if (report.experts_short_of_text > 0) {
    std::fprintf(
        stderr,
        "%d of %d experts were chosen by fewer tokens than their %lld columns; more text would round them "
        "better\n",
        report.experts_short_of_text, model.spec.moe_layers() * model.spec.experts,
        static_cast<long long>(model.spec.hidden));
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  if (options.common.json) {
    const nlohmann::ordered_json json = {{"out", options.out},
                                         {"bytes", report.bytes},
                                         {"bytes_before", report.bytes_before},
                                         {"tokens", text.tokens},
                                         {"seconds", seconds},
                                         {"experts_short_of_text", report.experts_short_of_text},
                                         {"workspace_bytes", report.workspace_bytes},
                                         {"workspace_peak_bytes", report.workspace_peak_bytes}};
    std::printf("%s\n", json.dump(2).c_str());
  } else {
    const std::string by =
        by_text ? " by " + std::to_string(text.tokens) + " tokens of text" : " to the nearest";
    std::printf(
        "%s: %s (%s before), rounded%s, in %s\n"
        "To run it, set model.path to this folder, and no formats.\n",
        options.out.c_str(), format_bytes(report.bytes).c_str(), format_bytes(report.bytes_before).c_str(),
        by.c_str(), format_seconds(seconds).c_str());
  }
  return 0;
}

}  // namespace lighter::cli
