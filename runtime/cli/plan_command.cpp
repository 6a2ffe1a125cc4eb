#include <cstdio>
#include <nlohmann/json.hpp>

#include "runtime/bytes.h"
#include "runtime/cli/commands.h"
#include "runtime/cli/prepared_model.h"

namespace lighter::cli {
namespace {

using Json = nlohmann::ordered_json;

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
      std::printf("what is missed when a token is decoded: %s (%s)\n", miss_name(model.miss), model.why_miss.c_str());
    }
  }
  if (plan.fits()) {
    std::printf("\nIt fits.\n");
  } else {
    std::printf("\nIt does not fit:\n");
    for (const auto& problem : plan.problems) std::printf("  %s\n", problem.c_str());
  }
}

Json to_json(const Config& config, const PreparedModel& model) {
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
          {"spare_slots", plan.pager.spare_slots}};
}

}  // namespace

int plan_command(const CommonOptions& options) {
  const Config config = load_config(options.config, options.overrides);
  const PreparedModel model = prepare(config);
  if (options.json) {
    std::printf("%s\n", to_json(config, model).dump(2).c_str());
  } else {
    print_text(config, model);
  }
  return model.plan.fits() ? 0 : 2;
}

}  // namespace lighter::cli
