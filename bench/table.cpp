#include "bench/table.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <vector>

#include "bench/statistics.h"
#include "runtime/bytes.h"

namespace lighter::bench {
namespace {

// The value at a path such as "decode.experts.hit_rate"; null where something on the way is null or absent.
Json at(const Json& point, const std::string& path) {
  const Json* node = &point;
  for (size_t begin = 0; begin <= path.size();) {
    const size_t end = std::min(path.find('.', begin), path.size());
    const std::string name = path.substr(begin, end - begin);
    if (!node->is_object() || !node->contains(name)) return nullptr;
    node = &(*node)[name];
    begin = end + 1;
  }
  return *node;
}

constexpr std::array kColumns = {"label",
                                 "model",
                                 "round",
                                 "status",
                                 "error.message",
                                 "settings.gpu_budget",
                                 "settings.policy",
                                 "settings.prefetch_depth",
                                 "settings.miss",
                                 "workload.prompt_tokens",
                                 "workload.generated_tokens",
                                 "workload.batch",
                                 "facts.architecture",
                                 "facts.synthetic",
                                 "facts.device",
                                 "facts.dtype",
                                 "facts.experts",
                                 "facts.routing",
                                 "facts.resident_share",
                                 "prefill_tokens_per_s.median",
                                 "decode_tokens_per_s.median",
                                 "decode_tokens_per_s.min",
                                 "decode_tokens_per_s.max",
                                 "time_to_first_token_s.median",
                                 "inter_token_ms.p50",
                                 "inter_token_ms.p90",
                                 "inter_token_ms.p99",
                                 "load_s",
                                 "load_kept",
                                 "store_kept",
                                 "memory.device_peak_bytes",
                                 "memory.device_driver_bytes",
                                 "memory.host_peak_bytes",
                                 "memory.process_peak_bytes",
                                 "decode.experts.hit_rate",
                                 "decode.experts.bytes_moved",
                                 "decode.experts.bytes_moved_per_token",
                                 "decode.experts.link_gb_per_s",
                                 "decode.experts.link_busy_gb_per_s",
                                 "decode.experts.cpu_bytes_per_token",
                                 "decode.experts.cpu_busy_gb_per_s",
                                 "decode.experts.stall_s",
                                 "decode.experts.stall_share",
                                 "decode.cpu_busy_share",
                                 "decode.gpu_busy_share",
                                 "decode.gpu_energy_j_per_token",
                                 "predicted_tokens_per_s",
                                 "measured_of_predicted",
                                 "bound.tokens_per_s",
                                 "bound.ratio",
                                 "bound.both_ways_tokens_per_s",
                                 "penalty",
                                 "prefill_penalty"};

std::string csv_field(const Json& value) {
  if (value.is_null()) return "";
  if (!value.is_string()) return value.dump();
  const std::string text = value.get<std::string>();
  if (text.find_first_of(",\"\n\r") == text.npos) return text;
  std::string quoted = "\"";
  for (const char c : text) quoted += c == '"' ? "\"\"" : std::string(1, c);
  return quoted + "\"";
}

std::string figure(const Json& value, const char* format, double scale = 1) {
  if (value.is_null()) return "–";
  char text[64];
  std::snprintf(text, sizeof text, format, scale * value.get<double>());
  return text;
}

std::string bytes(const Json& value) {
  return value.is_null() ? "–" : format_bytes(value.get<uint64_t>());
}

// In a table's cell, a line break or a bar would end it.
std::string cell(const std::string& text) {
  std::string shown;
  for (const char c : text) {
    const bool space = c == ' ' || c == '\n';
    if (space && shown.ends_with(' ')) continue;
    if (c == '|') shown += '\\';
    shown += space ? ' ' : c;
  }
  return shown;
}

std::string resident(const Json& point) {
  const Json share = at(point, "facts.resident_share");
  return share.is_null() ? "all" : figure(share, "%.0f %%", 100);
}

// One of the rounds with this workload; null if none was measured.
const Json* middle_round(const Json& results, const Json& workload) {
  std::vector<const Json*> rounds;
  for (const Json& point : results["points"]) {
    if (!point["round"].is_null() && point["status"] == "measured" && point["workload"] == workload)
      rounds.push_back(&point);
  }
  std::ranges::stable_sort(rounds, {}, [](const Json* point) {
    const Json rate = at(*point, "decode_tokens_per_s.median");
    return rate.is_null() ? 0.0 : rate.get<double>();
  });
  return rounds.empty() ? nullptr : rounds[rounds.size() / 2];
}

// What all measured points with experts have in common; "" where they differ.
std::string common_routing(const Json& results) {
  std::string routing;
  for (const Json& point : results["points"]) {
    const Json here = at(point, "facts.routing");
    if (here.is_null()) continue;
    if (!routing.empty() && routing != here) return "";
    routing = here;
  }
  return routing;
}

// Beyond what allocators keep, and a driver's own grain.
constexpr int64_t kMuchLeftBehind = int64_t{64} << 20;
constexpr double kMuchDrift = 0.05;

}  // namespace

std::vector<std::string> results_remarks(const Json& results) {
  std::vector<std::string> remarks;
  bool measured = false, failed = false;
  for (const Json& point : results["points"]) {
    if (point["round"].is_null()) continue;
    measured |= point["status"] == "measured";
    failed |= point["status"] == "failed";
  }
  if (failed && !measured) {
    remarks.push_back("The baseline, " + results["baseline"].get<std::string>() +
                      ", could not be measured, so there are no penalties; 'baseline' in the sweep can name "
                      "another model.");
  }
  if (const Json& drift = results["drift"]; !drift.is_null() && drift["share"].get<double>() > kMuchDrift) {
    remarks.push_back("The baseline drifted by " + figure(drift["share"], "%.1f %%", 100) +
                      " between its rounds; smaller differences between points say nothing.");
  }
  if (const Json& left = results["left_behind_bytes"];
      left.is_number() && left.get<int64_t>() > kMuchLeftBehind) {
    remarks.push_back("With nothing loaded, " + format_bytes(left.get<uint64_t>()) +
                      " more memory is in use than after the first load: something was not freed.");
  }
  return remarks;
}

std::string results_csv(const Json& results) {
  std::string csv;
  for (const char* column : kColumns) csv += (csv.empty() ? "" : ",") + std::string(column);
  csv += '\n';
  for (const Json& point : results["points"]) {
    std::string row;
    for (const char* column : kColumns)
      row += (column == kColumns.front() ? "" : ",") + csv_field(at(point, column));
    csv += row + '\n';
  }
  return csv;
}

std::string results_markdown(const Json& results) {
  const Json& machine = results["machine"];
  std::string text = "**" + cell(results["name"]) +
                     "**: " + (machine["gpu"].is_null() ? "" : machine["gpu"].get<std::string>() + ", ") +
                     machine["cpu"].get<std::string>() + " with " + machine["cores"].dump() +
                     " cores; median of " + results["repeats"].dump() + ". The baseline is " +
                     results["baseline"].get<std::string>();
  if (!results["drift"].is_null()) {
    text += ", measured first, in the middle and last; between these it drifted by " +
            figure(results["drift"]["share"], "%.1f %%", 100);
  }
  text += ".";
  if (const std::string routing = common_routing(results); !routing.empty() && routing != "router") {
    text += " Routing: " + cell(routing) + ".";
  }
  text += "\n\n";
  text +=
      "| point | tokens | resident | decode tok/s | penalty | of bound | ms a token p50 / p99 | first token "
      "| prefill tok/s "
      "| hit rate | moved a token | device memory | host memory "
      "|\n|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n";
  for (const Json& each : results["points"]) {
    if (!each["round"].is_null() && each["round"] != "first") continue;
    const Json* const middle = each["round"].is_null() ? nullptr : middle_round(results, each["workload"]);
    const Json& point = middle == nullptr ? each : *middle;
    const std::string name =
        cell(point["label"]) + (at(point, "facts.synthetic") == Json(true) ? " (synthetic)" : "");
    const Json& w = point["workload"];
    const std::string tokens = w["prompt_tokens"].dump() + " + " + w["generated_tokens"].dump() +
                               (w["batch"] == 1 ? "" : " × " + w["batch"].dump());
    text += "| " + name + " | " + tokens + " | ";
    if (point["status"] != "measured") {
      text += "| failed: " + cell(point["error"]["message"]) + " | | | | | | | | | |\n";
      continue;
    }
    const Json moved = at(point, "decode.experts.bytes_moved_per_token");
    text +=
        resident(point) + " | **" + figure(at(point, "decode_tokens_per_s.median"), "%.4g") + "** | " +
        figure(point["penalty"], "%.2f ×") + " | " + figure(at(point, "bound.ratio"), "%.0f %%", 100) +
        " | " + figure(at(point, "inter_token_ms.p50"), "%.3g") + " / " +
        figure(at(point, "inter_token_ms.p99"), "%.3g") + " | " +
        figure(at(point, "time_to_first_token_s.median"), "%.3g s") + " | " +
        figure(at(point, "prefill_tokens_per_s.median"), "%.4g") + " | " +
        figure(at(point, "decode.experts.hit_rate"), "%.1f %%", 100) + " | " +
        (moved.is_null() ? "–" : format_bytes(static_cast<uint64_t>(moved.get<double>()))) + " | " +
        bytes(at(point, at(point, "memory.device_driver_bytes").is_null() ? "memory.device_peak_bytes"
                                                                          : "memory.device_driver_bytes")) +
        " | " + bytes(at(point, "memory.host_peak_bytes")) + " |\n";
  }
  return text;
}

}  // namespace lighter::bench
