#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "runtime/bytes.h"
#include "runtime/cli/calibration_file.h"
#include "runtime/cli/commands.h"
#include "runtime/cli/model_config.h"
#include "runtime/cli/predicted_speed.h"
#include "runtime/cli/prepared_model.h"

namespace lighter::cli {
namespace {

using Json = nlohmann::ordered_json;

const char* part_name(double part, const offload::DecodeSpeed& d) {
  if (part == d.cpu_s && d.cpu_s >= d.link_s) return "the CPU's share of the misses";
  return part == d.link_s ? "misses on their way to the device" : "resident and shared experts";
}

void print_speed(const PredictedSpeed& speed, const UsableCalibration& rates, const PreparedModel& model) {
  const offload::DecodeSpeed& d = speed.decode;
  std::printf("\nPredicted, one sequence (rates: %s)\n", rates.calibration.source().c_str());
  if (!rates.note.empty()) std::printf("  (%s)\n", rates.note.c_str());
  std::printf("  decode  %10.1f tokens/s at %.0f tokens of context, %s", d.tokens_per_s, speed.decode_context,
              model.why_eager.empty() ? "as a graph" : "eagerly");
  if (speed.decode_bound_tokens_per_s) std::printf("; bound %.1f", *speed.decode_bound_tokens_per_s);
  std::printf("\n  prefill %10.1f tokens/s of %lld tokens; bound %.1f\n", speed.prefill.tokens_per_s,
              static_cast<long long>(speed.prefill_tokens), speed.prefill.bound_tokens_per_s);
  if (!model.plan.all_resident && speed.ways.size() > 1) {
    std::printf("  misses by %s", offload::miss_mode_name(d.mode));
    for (const offload::DecodeSpeed& way : speed.ways) {
      if (way.mode == d.mode) continue;
      std::printf("; %s would give %.1f tokens/s", offload::miss_mode_name(way.mode), way.tokens_per_s);
    }
    std::printf("\n");
  }
  const double longest = std::max({d.experts_s, d.cpu_s, d.link_s});
  const auto share = [&](double part) { return 100 * part / d.step_s; };
  std::printf("  a step of %.2f ms: attention, dense layers and head %.0f %%", 1e3 * d.step_s,
              share(d.outside_s));
  if (longest > 0) std::printf("; %s %.0f %%", part_name(longest, d), share(longest));
  std::printf("; launches and flags %.0f %%\n", share(d.fixed_s));
  if (model.plan.all_resident || longest == 0) return;
  std::printf("  meanwhile: resident and shared experts %.2f ms, CPU %.2f ms, link %.2f ms\n",
              1e3 * d.experts_s, 1e3 * d.cpu_s, 1e3 * d.link_s);
}

void print_text(const Config& config, const PreparedModel& model) {
  const offload::Plan& plan = model.plan;
  const auto row = [](const std::string& what, uint64_t device, uint64_t host) {
    const auto cell = [](uint64_t bytes) { return bytes == 0 ? std::string("-") : format_bytes(bytes); };
    std::printf("  %-24s %14s %14s\n", what.c_str(), cell(device).c_str(), cell(host).c_str());
  };
  std::printf("%s, %zu layers (%d with experts), %s, context %lld, prefill in chunks of %lld%s\n\n",
              model.spec.architecture.c_str(), model.spec.layers.size(), model.spec.moe_layers(),
              std::string(dtype_name(config.model.dtype)).c_str(),
              static_cast<long long>(config.memory.context), static_cast<long long>(model.prefill_chunk),
              config.model.is_synthetic() ? "; synthetic weights" : "");
  std::printf("  %-24s %14s %14s\n", "", "device", "host");
  for (const auto& line : plan.lines) row(line.what, line.device_bytes, line.host_bytes);
  row("sum", plan.device_bytes, plan.host_bytes);
  row("budget", plan.device_budget_bytes, plan.host_budget_bytes);
  if (model.spec.moe_layers() > 0) {
    std::printf("\n%.1f %% of the expert slices are resident", 100 * plan.resident_share);
    if (!plan.all_resident) {
      std::printf("; slices of %s, %d slots for those in transit", format_bytes(model.slice_bytes).c_str(),
                  plan.pager.spare_slots);
    }
    std::printf("\n");
    if (!plan.all_resident) {
      std::printf("what is missed when a token is decoded: %s (%s)\n", miss_name(model.miss),
                  model.why_miss.c_str());
    }
    if (plan.pager.prefetch && model.why_eager.empty()) {
      std::printf(
          "guessed experts are prefetched for prompts and batches; when one sequence is decoded, %s\n",
          model.cpu_computes()
              ? "the CPU reads ahead what it would compute of the next layer's guess (which the "
                "prediction leaves out)"
              : "a guess comes too late for a copy");
    }
  }
  if (plan.fits()) {
    std::printf("\nIt fits.\n");
  } else {
    std::printf("\nIt does not fit:\n");
    for (const auto& problem : plan.problems) std::printf("  %s\n", problem.c_str());
  }
}

Json speed_json(const PredictedSpeed& speed, const UsableCalibration& rates, const PreparedModel& model) {
  const offload::DecodeSpeed& d = speed.decode;
  Json ways = Json::object();
  for (const offload::DecodeSpeed& way : speed.ways) {
    ways[offload::miss_mode_name(way.mode)] = way.tokens_per_s;
  }
  const auto& bound = speed.decode_bound_tokens_per_s;
  return {{"rates", rates.calibration.source()},
          {"measured_here", rates.note.empty() && rates.calibration.measured()},
          {"note", rates.note},
          {"decode",
           {{"tokens_per_s", d.tokens_per_s},
            {"bound_tokens_per_s", bound ? Json(*bound) : Json()},
            {"context", speed.decode_context},
            {"graph", model.why_eager.empty()},
            {"miss", offload::miss_mode_name(d.mode)},
            {"why_miss", model.why_miss},
            {"tokens_per_s_by_miss", ways},
            {"step_s", d.step_s},
            {"outside_s", d.outside_s},
            {"experts_s", d.experts_s},
            {"cpu_s", d.cpu_s},
            {"link_s", d.link_s},
            {"fixed_s", d.fixed_s}}},
          {"prefill",
           {{"tokens_per_s", speed.prefill.tokens_per_s},
            {"bound_tokens_per_s", speed.prefill.bound_tokens_per_s},
            {"tokens", speed.prefill_tokens},
            {"compute_s", speed.prefill.compute_s},
            {"link_s", speed.prefill.link_s}}}};
}

Json to_json(const Config& config, const PreparedModel& model, const Json& speed) {
  const offload::Plan& plan = model.plan;
  Json lines = Json::array();
  for (const auto& line : plan.lines) {
    lines.push_back(
        {{"what", line.what}, {"device_bytes", line.device_bytes}, {"host_bytes", line.host_bytes}});
  }
  return {{"fits", plan.fits()},
          {"problems", plan.problems},
          {"architecture", model.spec.architecture},
          {"synthetic", config.model.is_synthetic()},
          {"dtype", dtype_name(config.model.dtype)},
          {"context", config.memory.context},
          {"prefill_chunk", model.prefill_chunk},
          {"lines", lines},
          {"device_bytes", plan.device_bytes},
          {"device_budget_bytes", plan.device_budget_bytes},
          {"host_bytes", plan.host_bytes},
          {"host_budget_bytes", plan.host_budget_bytes},
          {"miss", plan.all_resident ? "none" : miss_name(model.miss)},
          {"resident_share", plan.resident_share},
          {"resident_slices_per_layer", plan.pager.residents_per_layer},
          {"spare_slots", plan.pager.spare_slots},
          {"predicted", speed}};
}

}  // namespace

int plan_command(const PlanOptions& options) {
  const Config config = load_model_config(options.common.config, options.common.overrides);
  const PreparedModel model = prepare(config);
  const UsableCalibration rates = usable_calibration(config, model.threads, options.calibration);
  const PredictedSpeed speed = predict_speed(model, config, rates.calibration);
  if (options.common.json) {
    std::printf("%s\n", to_json(config, model, speed_json(speed, rates, model)).dump(2).c_str());
  } else {
    print_text(config, model);
    if (model.plan.fits()) print_speed(speed, rates, model);
  }
  return model.plan.fits() ? 0 : 2;
}

}  // namespace lighter::cli
