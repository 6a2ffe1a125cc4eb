#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "offload/replay.h"
#include "runtime/bytes.h"
#include "runtime/cli/commands.h"
#include "runtime/cli/console.h"
#include "runtime/error.h"

namespace lighter::cli {
namespace {

using Json = nlohmann::ordered_json;
using offload::PolicyKind;
using offload::ReplayCounts;
using offload::Trace;

const std::vector<double> kResident = {0.25, 0.33, 0.5, 0.67};

struct Row {
  double resident = 0;
  std::string policy;
  int ahead = 0;                     // layers; 0: no prefetch
  std::optional<ReplayCounts> all;   // nothing where only the second half counts
  std::optional<ReplayCounts> half;  // the second one; nothing for an expectation
  double expected_hit_rate = 0;      // of an expectation
};

std::vector<std::pair<std::string, PolicyKind>> policies(const std::string& name) {
  const std::vector<std::pair<std::string, PolicyKind>> all = {
      {"static", PolicyKind::static_}, {"lru", PolicyKind::lru}, {"lfu", PolicyKind::lfu}};
  if (name == "all") return all;
  for (const auto& entry : all) {
    if (entry.first == name) return {entry};
  }
  throw ConfigError("--policy " + name + ": there are static, lru, lfu and all");
}

std::vector<int> depths(const Trace& trace, int wanted) {
  const auto& recorded = trace.header().depths;
  if (wanted < 0) return recorded;
  if (wanted == 0) return {};
  if (std::find(recorded.begin(), recorded.end(), wanted) != recorded.end()) return {wanted};
  std::string list;
  for (const int depth : recorded) list += (list.empty() ? "" : ", ") + std::to_string(depth);
  throw ConfigError("--prefetch-depth " + std::to_string(wanted) + ": the trace holds guesses made " + list +
                    " layers ahead");
}

std::vector<Row> replay_all(const Trace& trace, const ReplayOptions& options, const std::vector<int>& ahead) {
  std::vector<Row> rows;
  const auto add = [&](double resident, const std::string& policy, int depth,
                       const offload::ReplayResult& result) {
    if (interrupted()) throw Interrupted();
    rows.push_back({resident, policy, depth, result.all, result.second_half});
  };
  for (const double resident : options.resident.empty() ? kResident : options.resident) {
    const auto slots = offload::residents_for(trace.header().grid(), resident);
    const double share =
        static_cast<double>(slots[0]) / static_cast<double>(trace.header().grid().slices_per_layer());
    rows.push_back({resident, "stripe (expected)", 0, std::nullopt, std::nullopt, share});
    for (const auto& [name, kind] : policies(options.policy)) {
      add(resident, name, 0, replay(trace, slots, kind, 0));
      if (kind != PolicyKind::static_) add(resident, name + ", behind", 0, replay_behind(trace, slots, kind));
      for (const int depth : ahead) add(resident, name, depth, replay(trace, slots, kind, depth));
    }
    rows.push_back({resident, "static-hot", 0, std::nullopt, replay_static_hot(trace, slots)});
    add(resident, "belady", 0, replay_clairvoyant(trace, slots));
  }
  return rows;
}

double bytes_per_token(const Trace& trace, uint64_t slices, size_t tokens) {
  return static_cast<double>(slices * trace.header().slice_bytes) / static_cast<double>(tokens);
}

size_t tokens_of(const Trace& trace, const Row& row) {
  return row.all ? trace.tokens() : trace.tokens() - trace.tokens() / 2;
}

Json quality_json(const offload::GuessQuality& quality) {
  Json layers = Json::array();
  for (const auto& layer : quality.layers) layers.push_back(layer ? Json(*layer) : Json(nullptr));
  return {{"accuracy", quality.all}, {"layers", layers}};
}

Json row_json(const Trace& trace, const Row& row) {
  Json json = {{"resident", row.resident}, {"policy", row.policy}, {"prefetch_depth", row.ahead}};
  if (!row.half) {
    json["hit_rate"] = row.expected_hit_rate;
    return json;
  }
  const ReplayCounts& counts = row.all ? *row.all : *row.half;
  const size_t tokens = tokens_of(trace, row);
  json["tokens"] = tokens;
  json["hit_rate"] = counts.hit_rate();
  json["hit_rate_in_time"] = counts.hit_rate_in_time();
  json["hit_rate_second_half"] = row.half->hit_rate_in_time();
  json["slices_used"] = counts.used;
  json["slices_resident"] = counts.resident;
  json["slices_prefetched"] = counts.prefetched;
  json["slices_missed"] = counts.missed;
  json["slices_wasted"] = counts.wasted;
  json["slices_promoted"] = counts.promoted;
  json["slices_moved_per_token"] = static_cast<double>(counts.moved()) / static_cast<double>(tokens);
  json["bytes_moved_per_token"] = bytes_per_token(trace, counts.moved(), tokens);
  json["bytes_wasted_per_token"] = bytes_per_token(trace, counts.wasted, tokens);
  return json;
}

void print_json(const Trace& trace, const std::vector<int>& ahead, const std::vector<Row>& rows) {
  const offload::TraceHeader& header = trace.header();
  Json predictor = Json::array();
  for (const int depth : ahead) {
    Json entry = {{"depth", depth}};
    entry.update(quality_json(guess_overlap(trace, depth)));
    predictor.push_back(entry);
  }
  Json results = Json::array();
  for (const Row& row : rows) results.push_back(row_json(trace, row));
  const Json json = {{"model", header.model},
                     {"dtype", header.dtype},
                     {"tokens", trace.tokens()},
                     {"sequences", trace.sequences()},
                     {"moe_layers", header.layers.size()},
                     {"experts", header.experts},
                     {"experts_per_token", header.experts_per_token},
                     {"slices", header.slices},
                     {"slice_bytes", header.slice_bytes},
                     {"predictor", predictor},
                     {"same_as_token_before", quality_json(repeat_overlap(trace))},
                     {"results", results}};
  std::printf("%s\n", json.dump(2).c_str());
}

std::string percent(double share) {
  char text[16];
  std::snprintf(text, sizeof text, "%.1f %%", 100 * share);
  return text;
}

void print_quality(const std::string& what, const offload::GuessQuality& quality) {
  std::printf("| %-21s |", what.c_str());
  for (const auto& layer : quality.layers) std::printf(" %7s |", layer ? percent(*layer).c_str() : "");
  std::printf(" %7s |\n", percent(quality.all).c_str());
}

void print_predictor(const Trace& trace, const std::vector<int>& ahead) {
  std::printf("| %-21s |", "guess / layer");
  for (const int layer : trace.header().layers) std::printf(" %7d |", layer);
  std::printf(" %7s |\n|%s|", "all", std::string(23, '-').c_str());
  for (size_t i = 0; i <= trace.header().layers.size(); ++i) std::printf("--------:|");
  std::printf("\n");
  for (const int depth : ahead) {
    print_quality(std::to_string(depth) + (depth == 1 ? " layer ahead" : " layers ahead"),
                  guess_overlap(trace, depth));
  }
  print_quality("as the token before", repeat_overlap(trace));
}

void print_row(const Trace& trace, const Row& row) {
  const auto cell = [](const std::string& text) { std::printf(" %12s |", text.c_str()); };
  std::printf("| %8s | %-17s | %5s |", percent(row.resident).c_str(), row.policy.c_str(),
              row.ahead == 0 ? "" : std::to_string(row.ahead).c_str());
  if (!row.half) {
    cell(percent(row.expected_hit_rate));
    for (int i = 0; i < 3; ++i) cell("");
  } else {
    const ReplayCounts& counts = row.all ? *row.all : *row.half;
    const auto bytes = [&](uint64_t slices) {
      return format_bytes(static_cast<uint64_t>(bytes_per_token(trace, slices, tokens_of(trace, row))));
    };
    cell(row.all ? percent(counts.hit_rate_in_time()) : "");
    cell(percent(row.half->hit_rate_in_time()));
    cell(bytes(counts.moved()));
    cell(row.ahead == 0 ? "" : bytes(counts.wasted));
  }
  std::printf("\n");
}

// Markdown, which also reads well as it is.
void print_text(const Trace& trace, const std::vector<int>& ahead, const std::vector<Row>& rows) {
  const offload::TraceHeader& header = trace.header();
  std::printf(
      "%s, %s: %zu tokens in %zu sequences; %zu MoE layers of %d experts, %d a token, in %d slices of %s "
      "each\n\n",
      header.model.c_str(), header.dtype.c_str(), trace.tokens(), trace.sequences(), header.layers.size(),
      header.experts, header.experts_per_token, header.slices, format_bytes(header.slice_bytes).c_str());
  std::printf("Share of a token's experts that a guess names:\n\n");
  print_predictor(trace, ahead);
  std::printf(
      "\nOne token a step (ahead: with what the predictor guesses so many layers ahead prefetched, all of it "
      "in time; behind: hot slices come behind the steps, as with the decode graph):\n\n");
  std::printf("| %8s | %-17s | %5s | %12s | %12s | %12s | %12s |\n", "resident", "policy", "ahead",
              "hit rate", "second half", "moved/token", "wasted/token");
  std::printf(
      "|---------:|-------------------|------:|-------------:|-------------:|-------------:|-------------:|"
      "\n");
  for (const Row& row : rows) print_row(trace, row);
}

}  // namespace

int replay_command(const ReplayOptions& options) {
  policies(options.policy);
  const Trace trace = Trace::read(options.trace);
  const std::vector<int> ahead = depths(trace, options.prefetch_depth);
  const std::vector<Row> rows = replay_all(trace, options, ahead);
  if (options.json) {
    print_json(trace, ahead, rows);
  } else {
    print_text(trace, ahead, rows);
  }
  return 0;
}

}  // namespace lighter::cli
