#include "bench/compare.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <map>
#include <vector>

#include "bench/results_file.h"
#include "bench/statistics.h"

namespace lighter::bench {
namespace {

constexpr double kNoiseFloor = 0.01;

// Nothing where the point has no such figure.
std::optional<Summary> repeated(const Json& point, const char* name) {
  const Json& value = point[name];
  if (value.is_null()) return std::nullopt;
  return Summary{value["median"], value["min"], value["max"], value["count"]};
}

std::optional<Summary> peak_mib(const Json& point, const char* name) {
  if (point["memory"].is_null()) return std::nullopt;
  const double mib = point["memory"][name].get<double>() / (1 << 20);
  return Summary{mib, mib, mib, 1};
}

struct Metric {
  const char* name;
  const char* title;
  bool higher_is_better;
  bool timed;  // drifts with the machine
  std::optional<Summary> (*of)(const Json& point, const char* name);
};
constexpr std::array kMetrics = {
    Metric{"decode_tokens_per_s", "decode tok/s", true, true, repeated},
    Metric{"prefill_tokens_per_s", "prefill tok/s", true, true, repeated},
    Metric{"time_to_first_token_s", "first token s", false, true, repeated},
    Metric{"device_peak_bytes", "device peak MiB", false, false, peak_mib},
    Metric{"host_peak_bytes", "host peak MiB", false, false, peak_mib},
};

// One point, or the baseline's rounds together.
struct Group {
  std::string label;
  bool measured = false;
  std::vector<Json> points;
};

std::map<std::string, Group> grouped(const Json& results) {
  std::map<std::string, Group> groups;
  for (const Json& point : results["points"]) {
    // A baseline is also compared when the other file has it as an ordinary point.
    Group& group = groups[point["key"].get<std::string>()];
    group.label = point["label"];
    if (point["status"] != "measured") continue;
    group.measured = true;
    group.points.push_back(point);
  }
  return groups;
}

double drift_of(const Json& results) {
  return results["drift"].is_null() ? 0 : results["drift"]["share"].get<double>();
}

// Nothing when no point of the group has it.
std::optional<Summary> metric_of(const Group& group, const Metric& metric) {
  std::vector<double> medians;
  double spread = 0;
  for (const Json& point : group.points) {
    const auto one = metric.of(point, metric.name);
    if (!one) continue;
    medians.push_back(one->median);
    spread = std::max(spread, one->spread());
  }
  if (medians.empty()) return std::nullopt;
  const double median = percentile(medians, 0.5);
  return Summary{median, median * (1 - spread / 2), median * (1 + spread / 2), medians.size()};
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.4g", value);
  return text;
}

std::string percent(double share, bool sign) {
  char text[32];
  std::snprintf(text, sizeof text, sign ? "%+.1f %%" : "%.1f %%", 100 * share);
  return text;
}

std::string joined(const Json& list) {
  std::string text;
  for (const Json& each : list) text += (text.empty() ? "" : "; ") + each.get<std::string>();
  return text;
}

Json machine_notes(const Json& before, const Json& after) {
  Json notes = Json::array();
  for (const char* name : {"gpu", "cpu", "cores"}) {
    const Json& a = before["machine"][name];
    const Json& b = after["machine"][name];
    if (a != b)
      notes.push_back(std::string("the machines differ: ") + name + " " + a.dump() + " and " + b.dump());
  }
  if (before["repeats"] == 1 || after["repeats"] == 1) {
    notes.push_back("a single repeat shows no noise, so only the baseline's drift counts as such");
  }
  return notes;
}

// By what differs and how: in how many points.
using Differences = std::map<std::array<std::string, 3>, int>;

void note_differences(const Group& before, const Group& after, Differences& differences) {
  for (const char* name : kComparedFacts) {
    const Json& a = before.points.front()["facts"][name];
    const Json& b = after.points.front()["facts"][name];
    if (a.is_number() && b.is_number() && std::abs(a.get<double>() - b.get<double>()) < 0.005) continue;
    if (a != b) ++differences[{name, a.dump(), b.dump()}];
  }
}

}  // namespace

Json compare_results(const Json& before, const Json& after) {
  const auto a = grouped(before), b = grouped(after);
  const double drift = std::max(drift_of(before), drift_of(after));
  Json result = {{"noise_floor", kNoiseFloor},
                 {"changes", Json::array()},
                 {"compared", 0},
                 {"unchanged", 0},
                 {"only_in_a", Json::array()},
                 {"only_in_b", Json::array()},
                 {"broken", Json::array()},
                 {"repaired", Json::array()},
                 {"notes", machine_notes(before, after)}};
  int compared = 0, unchanged = 0;
  Differences differences;
  for (const auto& [key, group] : a) {
    const auto other = b.find(key);
    if (other == b.end()) {
      result["only_in_a"].push_back(group.label);
      continue;
    }
    ++compared;
    if (group.measured && other->second.measured) note_differences(group, other->second, differences);
    if (group.measured != other->second.measured) {
      result[group.measured ? "broken" : "repaired"].push_back(group.label);
      continue;
    }
    bool changed = false;
    for (const Metric& metric : kMetrics) {
      const auto old_value = metric_of(group, metric), new_value = metric_of(other->second, metric);
      if (!old_value || !new_value || old_value->median <= 0) continue;
      const double change = new_value->median / old_value->median - 1;
      const double spread = std::max(old_value->spread(), new_value->spread());
      const double noise = std::max(kNoiseFloor, spread + (metric.timed ? drift : 0));
      if (std::abs(change) <= noise) continue;
      changed = true;
      result["changes"].push_back({{"label", group.label},
                                   {"metric", metric.name},
                                   {"title", metric.title},
                                   {"better", (change > 0) == metric.higher_is_better},
                                   {"before", old_value->median},
                                   {"after", new_value->median},
                                   {"change", change},
                                   {"noise", noise}});
    }
    unchanged += !changed && group.measured;
  }
  for (const auto& [key, group] : b) {
    if (!a.contains(key)) result["only_in_b"].push_back(group.label);
  }
  for (const auto& [what, points] : differences) {
    result["notes"].push_back(std::to_string(points) + (points == 1 ? " point differs" : " points differ") +
                              " in " + what[0] + ": " + what[1] + " and " + what[2]);
  }
  result["compared"] = compared;
  result["unchanged"] = unchanged;
  return result;
}

std::string comparison_markdown(const Json& comparison) {
  std::string text;
  for (const Json& note : comparison["notes"]) text += "Note: " + note.get<std::string>() + ".\n\n";
  if (comparison["compared"] == 0) {
    text +=
        "The two have no point in common, so nothing was compared; points are the same when model, settings "
        "and workload are.\n";
  } else if (comparison["changes"].empty()) {
    text += "Nothing changed beyond noise.\n";
  } else {
    text += "| point | what | before | after | change | noise | |\n|---|---|---:|---:|---:|---:|---|\n";
    for (const Json& change : comparison["changes"]) {
      text += "| " + change["label"].get<std::string>() + " | " + change["title"].get<std::string>() + " | " +
              number(change["before"]) + " | " + number(change["after"]) + " | **" +
              percent(change["change"], true) + "** | ± " + percent(change["noise"], false) + " | " +
              (change["better"] ? "better" : "worse") + " |\n";
    }
  }
  const std::string unchanged = comparison["unchanged"].dump();
  text += "\nWithin noise: " + unchanged + (unchanged == "1" ? " point." : " points.");
  const auto list = [&](const char* name, const char* title) {
    if (!comparison[name].empty()) text += std::string("\n") + title + ": " + joined(comparison[name]) + ".";
  };
  list("broken", "Measured before, failed after");
  list("repaired", "Failed before, measured after");
  list("only_in_a", "Only before");
  list("only_in_b", "Only after");
  return text + "\n";
}

}  // namespace lighter::bench
