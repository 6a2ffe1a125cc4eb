#include "bench/runner.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <set>
#include <vector>

#include "bench/earlier_results.h"
#include "bench/results_file.h"
#include "runtime/error.h"

namespace lighter::bench {
namespace {

const char* kind_of(const std::exception& error) {
  if (dynamic_cast<const CapacityError*>(&error)) return "CapacityError";
  if (dynamic_cast<const ConfigError*>(&error)) return "ConfigError";
  if (dynamic_cast<const CheckpointError*>(&error)) return "CheckpointError";
  if (dynamic_cast<const DeviceError*>(&error)) return "DeviceError";
  return "Error";
}

class Runner {
 public:
  Runner(const Sweep& sweep, Workbench& bench, const RunnerOptions& options)
      : sweep_(sweep), bench_(bench), options_(options) {}

  Outcome run() {
    const MachineFacts machine = bench_.machine();
    const Json before = earlier_results(options_.results, options_.resume, sweep_, machine);
    cores_ = machine.cores;
    Json& results = outcome_.results;
    try {
      // A resumed sweep keeps the ceilings that its first points were compared with.
      rates_ = before.is_null() ? bench_.measure_rates(sweep_.rates) : sweep_.rates;
      results = new_results(sweep_, machine, rates_);
      if (!before.is_null()) results["machine"]["rates"] = take_rates(before);
      for (size_t i = 0; i < sweep_.points.size(); ++i) visit(i, before);
      bench_.unload();
      note_in_use(bench_.in_use_bytes());
      results["complete"] = true;
      save();  // A profiler may take the program down.
      record_steps();
      bench_.unload();
    } catch (const Interrupted&) {
      outcome_.interrupted = true;
      if (results.is_null()) results = new_results(sweep_, machine, sweep_.rates);
      results["interrupted"] = true;
      // What an earlier run had measured further on is still true.
      for (const Point& point : sweep_.points) {
        const Json* done = find(before, point);
        if (done != nullptr && find(results, point) == nullptr) results["points"].push_back(*done);
      }
    }
    if (first_in_use_ && last_in_use_) {
      results["left_behind_bytes"] =
          static_cast<int64_t>(*last_in_use_) - static_cast<int64_t>(*first_in_use_);
    } else if (!before.is_null()) {
      results["left_behind_bytes"] = before["left_behind_bytes"];
    }
    save();
    return std::move(outcome_);
  }

 private:
  static const Json* find(const Json& results, const Point& point) {
    if (results.is_null()) return nullptr;
    for (const Json& each : results["points"]) {
      if (each["id"] == point.id && each["status"] == "measured") return &each;
    }
    return nullptr;
  }

  // Rates given since then count.
  Json take_rates(const Json& before) {
    const Json& now = outcome_.results["machine"]["rates"];
    Json taken = before["machine"]["rates"];
    for (const auto& [name, rate] : now.items()) {
      if (!rate.is_null() && rate["source"] == "given") taken[name] = rate;
    }
    const auto back = [&](const char* name, std::optional<double>& into) {
      if (!taken[name].is_null()) into = taken[name]["gb_per_s"].get<double>();
    };
    back("device_read", rates_.device_read);
    back("link", rates_.link);
    back("cpu_read", rates_.cpu_read);
    back("both", rates_.both);
    return taken;
  }

  void visit(size_t index, const Json& before) {
    const Point& point = sweep_.points[index];
    Json& points = outcome_.results["points"];
    if (const Json* done = find(before, point)) {
      ++outcome_.taken_over;
      points.push_back(*done);
      points.back()["label"] = point.label;
      return;
    }
    if (options_.interrupted != nullptr && *options_.interrupted) throw Interrupted();
    const std::string round =
        point.round == Round::none ? "" : std::string(" (baseline, ") + round_name(point.round) + ")";
    say("[" + std::to_string(index + 1) + "/" + std::to_string(sweep_.points.size()) + "] " + point.label +
        round);
    try {
      const Measured measured = measure(point);
      points.push_back(measured_point(point, measured, rates_, cores_));
      ++outcome_.measured;
      const Json& rate = points.back()["decode_tokens_per_s"];
      char text[64];
      std::snprintf(text, sizeof text, "      %.2f tokens/s",
                    rate.is_null() ? 0.0 : rate["median"].get<double>());
      say(rate.is_null() ? "      done" : text);
    } catch (const Interrupted&) {
      bench_.unload();
      throw;
    } catch (const std::exception& error) {
      bench_.unload();
      points.push_back(failed_point(point, kind_of(error), error.what()));
      ++outcome_.failed;
      say(std::string("      failed: ") + error.what());
    }
    save();
  }

  Measured measure(const Point& point) {
    const Workbench::Load load = bench_.load(point);
    if (!load.kept) note_in_use(load.in_use_before_bytes);
    Measured measured;
    measured.load_s = load.load_s;
    measured.load_kept = load.kept;
    measured.in_use_before_bytes = load.in_use_before_bytes;
    measured.store_kept = load.store_kept;
    measured.facts = load.point->facts(point.workload);
    int request = 0;
    for (int i = 0; i < sweep_.warmup; ++i) load.point->run(point.workload, request++);
    for (int i = 0; i < sweep_.repeats; ++i) {
      measured.samples.push_back(load.point->run(point.workload, request++));
    }
    measured.memory = load.point->memory();
    return measured;
  }

  // Of the points of a model, the one that is nearest to half resident, unless an earlier run has recorded
  // one. The baseline comes last: a profiler may serve only once in a process.
  void record_steps() {
    std::map<std::pair<bool, std::string>, std::vector<size_t>>
        by_model;  // places in the sweep and in the results
    std::set<std::string> recorded;
    const Json& points = outcome_.results["points"];
    for (size_t i = 0; i < points.size(); ++i) {
      const Point& point = sweep_.points[i];
      if (!points[i]["timeline"].is_null() && !points[i]["timeline"]["events"].empty())
        recorded.insert(point.model);
      if (points[i]["status"] != "measured" || point.round == Round::middle || point.round == Round::last)
        continue;
      by_model[{point.model == sweep_.baseline, point.model}].push_back(i);
    }
    for (const auto& [model, places] : by_model) {
      if (recorded.contains(model.second)) continue;
      const auto from_half = [&](size_t place) {
        const Json& share = points[place]["facts"]["resident_share"];
        return share.is_null() ? 1 : std::abs(share.get<double>() - 0.5);
      };
      const size_t place = *std::ranges::min_element(places, {}, from_half);
      outcome_.results["points"][place]["timeline"] = timeline_json(record_step(sweep_.points[place]));
      save();
    }
  }

  // A step that cannot be recorded takes nothing away from what was measured.
  Timeline record_step(const Point& point) {
    say("recording a step of " + point.label);
    try {
      LoadedPoint& loaded = *bench_.load(point).point;
      loaded.run(point.workload, 0);
      const Timeline timeline = loaded.record_step();
      if (timeline.note) say("      " + *timeline.note);
      return timeline;
    } catch (const Interrupted&) {
      throw;
    } catch (const std::exception& error) {
      bench_.unload();
      say(std::string("      failed: ") + error.what());
      return {"", {}, error.what()};
    }
  }

  // The very first load finds a device that no context has touched yet, so what counts begins after it.
  void note_in_use(std::optional<uint64_t> bytes) {
    if (!bytes) return;
    if (loads_++ == 1) first_in_use_ = bytes;
    last_in_use_ = bytes;
  }

  void save() {
    complete_results(outcome_.results);
    write_atomically(options_.results, results_text(outcome_.results));
    if (options_.saved) options_.saved(outcome_.results);
  }

  void say(const std::string& text) const {
    if (options_.say) options_.say(text);
  }

  const Sweep& sweep_;
  Workbench& bench_;
  const RunnerOptions& options_;
  Rates rates_;
  int cores_ = 1;
  Outcome outcome_;
  int loads_ = 0;
  std::optional<uint64_t> first_in_use_, last_in_use_;
};

}  // namespace

Outcome run_sweep(const Sweep& sweep, Workbench& bench, const RunnerOptions& options) {
  return Runner(sweep, bench, options).run();
}

}  // namespace lighter::bench
