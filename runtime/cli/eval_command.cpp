#include <chrono>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "runtime/bytes.h"
#include "runtime/cli/commands.h"
#include "runtime/cli/console.h"
#include "runtime/cli/model_config.h"
#include "runtime/cli/perplexity.h"
#include "runtime/cli/session.h"
#include "runtime/units.h"

namespace lighter::cli {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

struct EvalResult {
  double nll = 0;
  double seconds = 0;
};

EvalResult evaluate(Session& session, const TextWindows& text, ChunkLimits limits) {
  ProgressLine progress(ProgressUnit::tokens);
  const auto begin = Clock::now();
  const double nll = score_text(session.decoder(), text, limits, std::ref(progress));
  return {nll, std::chrono::duration<double>(Clock::now() - begin).count()};
}

void print_json(const Config& config, const Session& session, const TextWindows& text,
                const EvalResult& result) {
  const ExpertCounters counters = session.counters();
  const auto tokens = static_cast<double>(text.tokens);
  const Json json = {{"tokens", text.tokens},
                     {"nll", result.nll},
                     {"perplexity", std::exp(result.nll / tokens)},
                     {"bits_per_byte", result.nll / std::log(2.0) / static_cast<double>(text.bytes)},
                     {"windows", text.windows.size()},
                     {"context", config.memory.context},
                     {"bytes", text.bytes},
                     {"dtype", dtype_name(config.model.dtype)},
                     {"seconds", result.seconds},
                     {"tokens_per_s", tokens / result.seconds},
                     {"device_peak_bytes", session.device_peak_bytes()},
                     {"host_peak_bytes", session.host_peak_bytes()},
                     {"workspace_peak_bytes", session.workspace_peak_bytes()},
                     {"hit_rate", counters.hit_rate()},
                     {"slices_used", counters.slices_used},
                     {"slices_resident", counters.slices_resident},
                     {"slices_prefetched", counters.slices_prefetched},
                     {"slices_missed", counters.slices_missed},
                     {"bytes_moved", counters.bytes_moved()},
                     {"stall_s", counters.stall_s}};
  std::printf("%s\n", json.dump(2).c_str());
}

void print_text(const Config& config, const PreparedModel& model, Session& session, const TextWindows& text,
                const EvalResult& result) {
  const auto tokens = static_cast<double>(text.tokens);
  std::printf("perplexity %.4f  (%lld tokens in %zu windows of up to %lld; %.2f nats, %.4f bits a byte)\n",
              std::exp(result.nll / tokens), static_cast<long long>(text.tokens), text.windows.size(),
              static_cast<long long>(config.memory.context - 1), result.nll,
              result.nll / std::log(2.0) / static_cast<double>(text.bytes));
  const ExpertCounters counters = session.counters();
  std::fprintf(stderr, "%s, %s, on %s: %.1f tokens/s, %s", model.spec.architecture.c_str(),
               std::string(dtype_name(config.model.dtype)).c_str(), session.device().name().c_str(),
               tokens / result.seconds, format_seconds(result.seconds).c_str());
  if (!model.plan.all_resident) {
    std::fprintf(stderr, "; hit rate %.1f %%, %s moved", 100 * counters.hit_rate(),
                 format_bytes(counters.bytes_moved()).c_str());
  }
  std::fprintf(stderr, "\n");
}

}  // namespace

int eval_command(const EvalOptions& options) {
  const Config config = load_model_config(options.common.config, options.common.overrides);
  const PreparedModel model = prepare(config);
  const auto limit = options.tokens >= 0 ? std::optional<int64_t>(options.tokens) : std::nullopt;
  const TextWindows text = load_text_windows(options.text, config, limit);
  ProgressLine progress;
  Session session(config, model, std::ref(progress));
  progress.finish();
  const EvalResult result = evaluate(session, text, {model.prefill_chunk, logit_rows(model, config)});
  if (options.common.json) {
    print_json(config, session, text, result);
  } else {
    print_text(config, model, session, text, result);
  }
  return 0;
}

}  // namespace lighter::cli
