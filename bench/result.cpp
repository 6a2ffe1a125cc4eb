#include "bench/result.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "bench/statistics.h"
#include "runtime/utc_time.h"

namespace lighter::bench {
namespace {

template <typename T>
Json or_null(const std::optional<T>& value) {
  return value ? Json(*value) : Json();
}

// No infinity and no NaN in JSON, and none is wanted.
Json ratio(double above, double below) {
  return below > 0 && std::isfinite(above / below) ? Json(above / below) : Json();
}

Json summary_json(const Summary& summary) {
  return {{"median", summary.median}, {"min", summary.min}, {"max", summary.max}, {"count", summary.count}};
}

double rounded(double value, double step) {
  return std::round(value / step) * step;
}

Json rates_json(const Rates& given, const Rates& rates) {
  const auto one = [](const std::optional<double>& asked, const std::optional<double>& used) {
    if (!used) return Json();
    return Json{{"gb_per_s", *used}, {"source", asked ? "given" : "measured"}};
  };
  return {{"device_read", one(given.device_read, rates.device_read)},
          {"link", one(given.link, rates.link)},
          {"cpu_read", one(given.cpu_read, rates.cpu_read)},
          {"both", one(given.both, rates.both)}};
}

Json heading(const Point& point) {
  return {{"id", point.id},
          {"key", point.key},
          {"label", point.label},
          {"model", point.model},
          {"round", point.round == Round::none ? Json() : Json(round_name(point.round))},
          {"config", point.config.string()},
          {"overrides", point.overrides},
          {"settings", point.settings},
          {"workload",
           {{"prompt_tokens", point.workload.prompt_tokens},
            {"generated_tokens", point.workload.generated_tokens},
            {"batch", point.workload.batch}}}};
}

template <typename Get>
std::vector<double> each(const std::vector<RequestSample>& samples, Get get) {
  std::vector<double> values;
  for (const RequestSample& sample : samples) values.push_back(get(sample));
  return values;
}

double prefill_rate(const RequestSample& sample, const Workload& w) {
  return static_cast<double>(w.prompt_tokens * w.batch) / sample.prefill.wall_s;
}

double decode_rate(const RequestSample& sample, const Workload& w) {
  return static_cast<double>(sample.step_s.size()) * w.batch / sample.decode.wall_s;
}

// Of all samples together.
Spent total(const std::vector<RequestSample>& samples, Spent RequestSample::*phase) {
  Spent sum;
  sum.gpu_busy_share = 0;
  sum.gpu_energy_j = 0;
  for (const RequestSample& sample : samples) {
    const Spent& spent = sample.*phase;
    sum.wall_s += spent.wall_s;
    sum.cpu_s += spent.cpu_s;
    if (sum.gpu_busy_share && spent.gpu_busy_share) {
      *sum.gpu_busy_share += *spent.gpu_busy_share * spent.wall_s;
    } else {
      sum.gpu_busy_share.reset();
    }
    if (sum.gpu_energy_j && spent.gpu_energy_j) {
      *sum.gpu_energy_j += *spent.gpu_energy_j;
    } else {
      sum.gpu_energy_j.reset();
    }
    sum.experts = sum.experts + spent.experts;
  }
  if (sum.gpu_busy_share) *sum.gpu_busy_share /= sum.wall_s;
  return sum;
}

Json experts_json(const ExpertCounters& c, double wall_s, double tokens) {
  return {{"hit_rate", c.slices_used > 0 ? Json(c.hit_rate()) : Json()},
          {"slices_used", c.slices_used},
          {"slices_resident", c.slices_resident},
          {"slices_prefetched", c.slices_prefetched},
          {"slices_missed", c.slices_missed},
          {"evictions", c.evictions},
          {"bytes_moved", c.bytes_moved()},
          {"bytes_moved_per_token", ratio(static_cast<double>(c.bytes_moved()), tokens)},
          {"prefetch_bytes", c.prefetch_bytes},
          {"prefetch_wasted_bytes", c.prefetch_wasted_bytes},
          {"link_gb_per_s", ratio(static_cast<double>(c.bytes_moved()) / 1e9, wall_s)},
          {"link_busy_gb_per_s", ratio(static_cast<double>(c.demand_busy_bytes) / 1e9, c.demand_busy_s)},
          {"link_busy_share", ratio(c.demand_busy_s, wall_s)},
          {"stall_s", c.stall_s},
          {"stall_share", ratio(c.stall_s, wall_s)},
          {"cpu_bytes_per_token", ratio(static_cast<double>(c.cpu_bytes), tokens)},
          {"cpu_busy_gb_per_s", ratio(static_cast<double>(c.cpu_bytes) / 1e9, c.cpu_busy_s)},
          {"cpu_busy_share", ratio(c.cpu_busy_s, wall_s)},
          {"cpu_expected_share",
           ratio(static_cast<double>(c.cpu_layers_expected), static_cast<double>(c.cpu_layers))}};
}

Json phase_json(const Spent& spent, const PointFacts& facts, double tokens, int cores) {
  return {{"wall_s", spent.wall_s},
          {"cpu_busy_share", ratio(spent.cpu_s, spent.wall_s * cores)},
          {"gpu_busy_share", or_null(spent.gpu_busy_share)},
          {"gpu_energy_j_per_token", spent.gpu_energy_j ? ratio(*spent.gpu_energy_j, tokens) : Json()},
          {"experts", facts.has_experts ? experts_json(spent.experts, spent.wall_s, tokens) : Json()}};
}

Json bound_json(const Measured& measured, const Workload& w, const Rates& rates, const Spent& decode,
                double tokens_per_s) {
  const PointFacts& facts = measured.facts;
  double resident = facts.resident_share;
  if (facts.has_experts && decode.experts.slices_used > 0) {
    resident = std::max(resident, decode.experts.hit_rate());
  }
  const double context = static_cast<double>(w.prompt_tokens) + static_cast<double>(w.generated_tokens) / 2;
  const auto rate = [&](MissWay way, double share) {
    const auto step = step_bound_s(facts.step_bytes, share, way, rates, w.batch, context);
    return step ? ratio(w.batch, *step) : Json();
  };
  const Json own = rate(facts.miss_way, resident);
  if (own.is_null()) return nullptr;
  // The bound against the resident share, for the plot: where the hit rate is the share.
  Json curve = Json::array();
  constexpr int kSteps = 20;
  for (int i = 0; facts.has_experts && i <= kSteps; ++i) {
    const double share = static_cast<double>(i) / kSteps;
    curve.push_back({{"resident_share", share},
                     {"link", rate(MissWay::link, share)},
                     {"cpu", rate(MissWay::cpu, share)},
                     {"both", rate(MissWay::both, share)}});
  }
  return {{"way", miss_way_name(facts.miss_way)},
          {"hit_share", resident},
          {"tokens_per_s", own},
          {"ratio", ratio(tokens_per_s, own.get<double>())},
          {"both_ways_tokens_per_s", rate(MissWay::both, resident)},
          {"curve", curve}};
}

Json memory_json(const Measured& measured) {
  Json classes = Json::array();
  for (const MemoryClass& line : measured.facts.memory) {
    classes.push_back(
        {{"what", line.what}, {"device_bytes", line.device_bytes}, {"host_bytes", line.host_bytes}});
  }
  return {{"gpu_budget_bytes", measured.facts.gpu_budget_bytes},
          {"host_budget_bytes", measured.facts.host_budget_bytes},
          {"device_peak_bytes", measured.memory.device_bytes},
          {"device_driver_bytes", or_null(measured.memory.device_driver_bytes)},
          {"host_peak_bytes", measured.memory.host_bytes},
          {"process_peak_bytes", measured.memory.process_bytes},
          {"in_use_before_bytes", or_null(measured.in_use_before_bytes)},
          {"classes", classes}};
}

Json facts_json(const PointFacts& facts) {
  return {{"architecture", facts.architecture},
          {"synthetic", facts.synthetic},
          {"device", facts.device},
          {"dtype", facts.dtype},
          {"experts", facts.has_experts ? Json(facts.experts) : Json()},
          {"routing", facts.has_experts ? Json(facts.routing) : Json()},
          {"prompts", facts.prompts},
          {"layers", facts.layers},
          {"decode", facts.decode},
          {"threads", facts.threads},
          {"context", facts.context},
          {"resident_share", facts.has_experts ? Json(facts.resident_share) : Json()}};
}

std::vector<double> latencies_ms(const RequestSample& sample) {
  std::vector<double> all;
  for (const double s : sample.step_s) all.push_back(s * 1e3);
  return all;
}

bool measured_baseline(const Json& point) {
  return !point["round"].is_null() && point["status"] == "measured";
}

std::vector<double> baseline_rates(const Json& results, const Json& workload, const char* what) {
  std::vector<double> rates;
  for (const Json& point : results["points"]) {
    if (!measured_baseline(point) || point["workload"] != workload) continue;
    if (!point[what].is_null()) rates.push_back(point[what]["median"].get<double>());
  }
  return rates;
}

Json penalty(const Json& results, const Json& point, const char* what) {
  if (point["status"] != "measured" || point[what].is_null()) return nullptr;
  const std::vector<double> rates = baseline_rates(results, point["workload"], what);
  if (rates.empty()) return nullptr;
  return ratio(percentile(rates, 0.5), point[what]["median"].get<double>());
}

Json drift(const Json& results) {
  Json workloads = Json::array();
  double worst = 0;
  for (const Json& point : results["points"]) {
    if (!measured_baseline(point)) continue;
    const bool known = std::ranges::any_of(
        workloads, [&](const Json& entry) { return entry["workload"] == point["workload"]; });
    if (known) continue;
    const auto rates = baseline_rates(results, point["workload"], "decode_tokens_per_s");
    if (rates.size() < 2) continue;
    const double share = summarize(rates).spread();
    worst = std::max(worst, share);
    workloads.push_back({{"workload", point["workload"]}, {"decode_tokens_per_s", rates}, {"share", share}});
  }
  if (workloads.empty()) return nullptr;
  return {{"share", worst}, {"workloads", workloads}};
}

}  // namespace

Json new_results(const Sweep& sweep, const MachineFacts& machine, const Rates& rates) {
  return {{"format", "lighter-bench"},
          {"version", kResultsVersion},
          {"name", sweep.name},
          {"created", utc_time("%Y-%m-%dT%H:%M:%SZ")},
          {"complete", false},
          {"interrupted", false},
          {"baseline", sweep.baseline},
          {"warmup", sweep.warmup},
          {"repeats", sweep.repeats},
          {"machine",
           {{"device", machine.device},
            {"gpu", or_null(machine.gpu)},
            {"driver", or_null(machine.driver)},
            {"cpu", machine.cpu},
            {"cores", machine.cores},
            {"host_memory_bytes", machine.host_memory_bytes},
            {"rates", rates_json(sweep.rates, rates)}}},
          {"drift", nullptr},
          {"left_behind_bytes", nullptr},
          {"points", Json::array()}};
}

Json measured_point(const Point& point, const Measured& measured, const Rates& rates, int cores) {
  const Workload& w = point.workload;
  const auto& samples = measured.samples;
  const Spent prefill = total(samples, &RequestSample::prefill),
              decode = total(samples, &RequestSample::decode);
  std::vector<double> first, steps;
  Json runs = Json::array();
  size_t step_count = 0;
  for (const RequestSample& sample : samples) {
    first.insert(first.end(), sample.first_token_s.begin(), sample.first_token_s.end());
    const std::vector<double> ms = latencies_ms(sample);
    steps.insert(steps.end(), ms.begin(), ms.end());
    step_count += ms.size();
    Json shown = Json::array();
    for (const double value : ms) shown.push_back(rounded(value, 1e-4));
    runs.push_back({{"prefill_s", sample.prefill.wall_s},
                    {"decode_s", sample.decode.wall_s},
                    {"first_token_s", sample.first_token_s},
                    {"token_ms", shown}});
  }
  const bool decoded = step_count > 0;
  Json decode_summary, latency;
  double tokens_per_s = 0;
  if (decoded) {
    const Summary summary = summarize(each(samples, [&](const auto& s) { return decode_rate(s, w); }));
    tokens_per_s = summary.median;
    decode_summary = summary_json(summary);
    latency = {{"p50", percentile(steps, 0.5)},
               {"p90", percentile(steps, 0.9)},
               {"p99", percentile(steps, 0.99)},
               {"max", std::ranges::max(steps)},
               {"count", steps.size()}};
  }
  const double prompt_tokens =
      static_cast<double>(w.prompt_tokens * w.batch) * static_cast<double>(samples.size());
  const auto& predicted = measured.facts.predicted_tokens_per_s;

  Json json = heading(point);
  json["status"] = "measured";
  json["error"] = nullptr;
  json["facts"] = facts_json(measured.facts);
  json["load_s"] = measured.load_s;
  json["load_kept"] = measured.load_kept;
  json["store_kept"] = measured.store_kept;
  json["prefill_tokens_per_s"] =
      summary_json(summarize(each(samples, [&](const auto& s) { return prefill_rate(s, w); })));
  json["decode_tokens_per_s"] = decode_summary;
  json["time_to_first_token_s"] = summary_json(summarize(first));
  json["inter_token_ms"] = latency;
  json["prefill"] = phase_json(prefill, measured.facts, prompt_tokens, cores);
  json["decode"] =
      decoded ? phase_json(decode, measured.facts, static_cast<double>(step_count) * w.batch, cores) : Json();
  json["memory"] = memory_json(measured);
  json["predicted_tokens_per_s"] = or_null(predicted);
  json["measured_of_predicted"] = predicted && decoded ? ratio(tokens_per_s, *predicted) : Json();
  json["bound"] = decoded ? bound_json(measured, w, rates, decode, tokens_per_s) : Json();
  json["penalty"] = nullptr;
  json["prefill_penalty"] = nullptr;
  json["runs"] = runs;
  json["timeline"] = nullptr;
  return json;
}

Json timeline_json(const Timeline& timeline) {
  Json events = Json::array();
  for (const TimelineEvent& event : timeline.events) {
    events.push_back({{"lane", event.lane},
                      {"name", event.name},
                      {"begin_us", rounded(event.begin_us, 0.01)},
                      {"end_us", rounded(event.end_us, 0.01)}});
  }
  return {{"source", timeline.source}, {"note", or_null(timeline.note)}, {"events", events}};
}

Json failed_point(const Point& point, const std::string& kind, const std::string& message) {
  Json json = heading(point);
  json["status"] = "failed";
  json["error"] = {{"kind", kind}, {"message", message}};
  for (const char* name :
       {"facts", "load_s", "load_kept", "store_kept", "prefill_tokens_per_s", "decode_tokens_per_s",
        "time_to_first_token_s", "inter_token_ms", "prefill", "decode", "memory", "predicted_tokens_per_s",
        "measured_of_predicted", "bound", "penalty", "prefill_penalty"}) {
    json[name] = nullptr;
  }
  json["runs"] = Json::array();
  json["timeline"] = nullptr;
  return json;
}

void complete_results(Json& results) {
  for (Json& point : results["points"]) {
    point["penalty"] = penalty(results, point, "decode_tokens_per_s");
    point["prefill_penalty"] = penalty(results, point, "prefill_tokens_per_s");
  }
  results["drift"] = drift(results);
}

}  // namespace lighter::bench
