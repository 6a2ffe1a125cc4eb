#include <cstdio>
#include <nlohmann/json.hpp>

#include "runtime/bytes.h"
#include "runtime/cli/commands.h"
#include "runtime/cli/console.h"
#include "runtime/cli/model_config.h"
#include "runtime/cli/model_text.h"
#include "runtime/cli/session.h"
#include "runtime/engine/generator.h"
#include "runtime/error.h"
#include "runtime/units.h"

namespace lighter::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kInterruptedExit = 130;  // as shells report Ctrl-C
Json logprobs_json(const GenerateResult& result) {
  Json all = Json::array();
  for (const auto& token : result.logprobs) {
    Json entries = Json::array();
    for (const auto& [id, logprob] : token) entries.push_back({{"id", id}, {"logprob", logprob}});
    all.push_back(entries);
  }
  return all;
}

void print_json(const Config& config, const PreparedModel& model, const Session& session,
                const GenerateRequest& request, const GenerateResult& result,
                const ExpertCounters& counters) {
  const Json json = {{"prompt_ids", request.prompt},
                     {"ids", result.ids},
                     {"text", result.text},
                     {"finish_reason", finish_reason_name(result.finish)},
                     {"logprobs", logprobs_json(result)},
                     {"prefill_tokens_per_s", result.prefill_tokens_per_s()},
                     {"decode_tokens_per_s", result.decode_tokens_per_s()},
                     {"decode", model.why_eager.empty() ? "graph" : "eager"},
                     {"time_to_first_token_s", result.time_to_first_token_s},
                     {"device_peak_bytes", session.device_peak_bytes()},
                     {"host_peak_bytes", session.host_peak_bytes()},
                     {"workspace_peak_bytes", session.workspace_peak_bytes()},
                     {"hit_rate", counters.hit_rate()},
                     {"slices_used", counters.slices_used},
                     {"slices_resident", counters.slices_resident},
                     {"slices_prefetched", counters.slices_prefetched},
                     {"slices_missed", counters.slices_missed},
                     {"miss", model.plan.all_resident ? "none" : miss_name(model.miss)},
                     {"bytes_moved", counters.bytes_moved()},
                     {"cpu_bytes", counters.cpu_bytes},
                     {"cpu_busy_s", counters.cpu_busy_s},
                     {"cpu_layers", counters.cpu_layers},
                     {"cpu_layers_expected", counters.cpu_layers_expected},
                     {"prefetch_bytes", counters.prefetch_bytes},
                     {"prefetch_wasted_bytes", counters.prefetch_wasted_bytes},
                     {"stall_s", counters.stall_s},
                     {"copy_busy_s", counters.demand_busy_s},
                     {"copy_busy_bytes", counters.demand_busy_bytes},
                     {"synthetic", config.model.is_synthetic()}};
  std::printf("%s\n", json.dump(2, ' ', false, Json::error_handler_t::replace).c_str());
}

void print_summary(const Config& config, const PreparedModel& model, Session& session,
                   const GenerateResult& result, const ExpertCounters& counters) {
  std::fprintf(stderr, "\n\n%s%s, %s, on %s: %lld + %zu tokens (%s)\n", model.spec.architecture.c_str(),
               config.model.is_synthetic() ? " with synthetic weights" : "",
               std::string(dtype_name(config.model.dtype)).c_str(), session.device().name().c_str(),
               static_cast<long long>(result.prompt_tokens), result.ids.size(),
               finish_reason_name(result.finish));
  std::fprintf(stderr, "  prefill   %.1f tokens/s, first token after %s\n", result.prefill_tokens_per_s(),
               format_seconds(result.time_to_first_token_s).c_str());
  std::fprintf(stderr, "  decode    %.1f tokens/s, %s%s\n", result.decode_tokens_per_s(),
               model.why_eager.empty() ? "one CUDA graph a token" : "eager: ", model.why_eager.c_str());
  std::fprintf(
      stderr, "  memory    device %s of %s, host %s of %s at peak\n",
      format_bytes(session.device_peak_bytes()).c_str(), format_bytes(config.memory.gpu_budget_bytes).c_str(),
      format_bytes(session.host_peak_bytes()).c_str(), format_bytes(config.memory.host_budget_bytes).c_str());
  if (counters.slices_used == 0) return;
  std::fprintf(stderr, "  experts   %.1f %% of their slices resident, hit rate %.1f %%\n",
               100 * model.plan.resident_share, 100 * counters.hit_rate());
  if (model.plan.all_resident) return;
  std::fprintf(
      stderr,
      "Of %llu expert slices used, %llu were on the device. Of the others, %s came over the link, %s of it "
      "ahead of need, with %s spent waiting; the CPU computed %s.\n",
      static_cast<unsigned long long>(counters.slices_used),
      static_cast<unsigned long long>(counters.slices_resident), format_bytes(counters.bytes_moved()).c_str(),
      format_bytes(counters.prefetch_bytes).c_str(), format_seconds(counters.stall_s).c_str(),
      format_bytes(counters.cpu_bytes).c_str());
  if (counters.cpu_layers_expected == 0) return;
  std::fprintf(
      stderr, "It had expected the experts of %.1f %% of its layers, to read ahead.\n",
      100.0 * static_cast<double>(counters.cpu_layers_expected) / static_cast<double>(counters.cpu_layers));
}

}  // namespace

int run_command(const RunOptions& options) {
  const Config config = load_model_config(options.common.config, options.common.overrides);
  const PreparedModel model = prepare(config);
  ProgressLine progress;
  const ModelText text = load_text(config.model);
  GenerateRequest request = make_request(config, model, text, options.prompt, options.max_tokens);
  request.logprobs = options.logprobs;
  Session session(config, model, std::ref(progress));
  progress.finish();

  Generator generator(session.decoder(), text.tokenizer_or_null(), interrupted());
  const bool json = options.common.json;
  ProgressLine prefill(ProgressUnit::tokens);
  const auto result = generator.generate(
      request,
      [&](const std::string& shown) {
        if (json) return;
        std::fwrite(shown.data(), 1, shown.size(), stdout);
        std::fflush(stdout);
      },
      [&](int64_t done, int64_t total) {
        prefill("prefill", static_cast<uint64_t>(done), static_cast<uint64_t>(total));
        if (done == total) prefill.finish();
      });
  const ExpertCounters counters = session.counters();
  if (json) {
    print_json(config, model, session, request, result, counters);
  } else {
    if (!text.tokenizer) {
      for (const int64_t id : result.ids) std::printf("%lld ", static_cast<long long>(id));
    }
    std::printf("\n");
    std::fflush(stdout);
    print_summary(config, model, session, result, counters);
  }
  return result.finish == FinishReason::interrupted ? kInterruptedExit : 0;
}

}  // namespace lighter::cli
