// YAML → models and blocks → every combination of a block's lists → points in their order.
#include "bench/sweep.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <functional>
#include <map>

#include "bench/yaml_map.h"
#include "offload/trace.h"
#include "runtime/config/config.h"
#include "runtime/config/config_keys.h"
#include "runtime/error.h"

namespace lighter::bench {
namespace {

using Json = nlohmann::ordered_json;
using nlohmann::json;

constexpr uint64_t kMostTokens = uint64_t{1} << 24;
constexpr double kMostGbPerS = 1e6;
constexpr char kSequences[] = "memory.sequences";

// An axis that becomes overrides of the configuration.
struct Axis {
  std::string name;
  std::string key;  // of the configuration, which says what values there are
};

// In the order in which they vary, the last one fastest: what costs a load comes first.
const std::vector<Axis>& axes() {
  static const std::vector<Axis> list = {
      {"format", "model.format"},
      {"experts", "model.experts"},
      {"gpu_budget", "memory.gpu_budget"},
      {"policy", "offload.policy"},
      {"prefetch_depth", "offload.prefetch.depth"},
      {"miss", "offload.miss"},
      {"resident", "offload.resident"},
  };
  return list;
}

// A list that the key itself accepts (a ratio for each layer) would look like several values: it is not one.
std::vector<ValueForm> axis_forms(const Axis& axis) {
  if (axis.name == "prefetch_depth") return {forms::integer(0, 8)};
  std::vector<ValueForm> forms = find_key(axis.key)->forms;
  std::erase_if(forms, [](const ValueForm& form) { return form.kind == ValueForm::Kind::list; });
  return forms;
}

std::vector<std::string> axis_overrides(const Axis& axis, const std::string& value) {
  if (axis.name != "prefetch_depth") return {axis.key + "=" + value};
  if (value == "0") return {"offload.prefetch.enabled=false"};
  return {"offload.prefetch.enabled=true", axis.key + "=" + value};
}

std::vector<MapKey> file_keys() {
  return {{"name", {forms::text("a name")}, true},
          {"baseline", {forms::text("the name of a model")}},
          {"warmup", {forms::integer(0, 1000)}},
          {"repeats", {forms::integer(1, 1000)}},
          {"models", {}, true},
          {"points", {}, true},
          {"prompt", {}},
          {"trace", {forms::text("the path of a file that `lighter trace` wrote")}},
          {"rates", {}}};
}

std::vector<MapKey> model_keys() {
  return {{"name", {forms::text("a name")}, true},
          {"config", {forms::text("the path of a configuration")}, true},
          {"set", {forms::list_of(forms::text("key.path=value"))}}};
}

std::vector<MapKey> block_keys() {
  std::vector<MapKey> keys = {{"models", {forms::list_of(forms::text("the name of a model"))}, true},
                              {"set", {forms::list_of(forms::text("key.path=value"))}},
                              {"prompt_tokens", {forms::integer(1, kMostTokens)}, false, true},
                              {"generated_tokens", {forms::integer(1, kMostTokens)}, false, true},
                              {"batch", find_key(kSequences)->forms, false, true}};
  for (const Axis& axis : axes()) keys.push_back({axis.name, axis_forms(axis), false, true});
  return keys;
}

struct ModelEntry {
  std::string name;
  std::filesystem::path config;
  std::string text;  // of the configuration
  std::vector<std::string> set;
};

// A scalar counts as a list of one.
json values_of(const YamlMap& map, const std::string& name, const json& fallback) {
  const MapEntry* entry = map.find(name);
  if (entry == nullptr) return fallback;
  if (!entry->value.is_array()) return json::array({entry->value});
  if (entry->value.empty()) fail_at(entry->where, "'" + name + "' is an empty list");
  return entry->value;
}

std::string as_text(const json& value) {
  return value.is_string() ? value.get<std::string>() : value.dump();
}

std::string hex(uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

uint64_t fnv1a(const std::string& text) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return hash;
}

// What the configuration says of its own model makes way for the usual baseline's; device and budgets stay.
std::vector<std::string> usual_baseline_overrides() {
  std::vector<std::string> overrides;
  for (const ConfigKey& key : config_keys()) {
    if (key.path.starts_with("model.")) overrides.push_back(key.path + "=");
  }
  for (const char* text :
       {"model.synthetic=llama-3.1-8b", "offload.resident=1", "offload.policy=static",
        "offload.pin=", "offload.miss=", "offload.slice_width=", "offload.prefetch.enabled=false"}) {
    overrides.push_back(text);
  }
  return overrides;
}

Json workload_json(const Workload& w) {
  return {{"prompt_tokens", w.prompt_tokens}, {"generated_tokens", w.generated_tokens}, {"batch", w.batch}};
}

class Reader {
 public:
  explicit Reader(const std::filesystem::path& file) : source_{file.string()}, folder_(file.parent_path()) {}

  Sweep read(const YAML::Node& root) {
    const YamlMap map(source_, "", root, file_keys());
    sweep_.name = map.at("name").value.get<std::string>();
    sweep_.warmup = map.get("warmup", 1);
    sweep_.repeats = map.get("repeats", 3);
    const MapEntry* const trace = map.find("trace");
    if (trace != nullptr) read_trace(*trace);
    if (const MapEntry* prompt = map.find("prompt")) read_prompt(prompt->node);
    if (const MapEntry* rates = map.find("rates")) read_rates(rates->node);
    read_models(map.at("models"));
    sweep_.baseline = map.get<std::string>("baseline", kUsualBaseline);
    const MapEntry* const named = map.find("baseline");
    const std::string baseline_where = named == nullptr ? map.where() : named->where;
    if (named == nullptr) add_usual_baseline(map.find("prompt"));
    const ModelEntry baseline = model(sweep_.baseline, baseline_where);
    const MapEntry& blocks = map.at("points");
    check_list("points", blocks);
    for (size_t i = 0; i < blocks.node.size(); ++i)
      read_block("points[" + std::to_string(i) + "]", blocks.node[i]);
    if (trace != nullptr && !any_synthetic_) {
      fail_at(trace->where,
              "a recorded trace replaces the router of synthetic weights, but no point has any; remove "
              "'trace', or use model.synthetic");
    }
    arrange(baseline, baseline_where);
    return std::move(sweep_);
  }

 private:
  std::filesystem::path resolved(const MapEntry& entry) const {
    return (folder_ / entry.value.get<std::string>()).lexically_normal();
  }

  std::filesystem::path readable(const MapEntry& entry) const {
    std::filesystem::path path = resolved(entry);
    std::error_code error;
    if (!std::filesystem::is_regular_file(path, error) || !std::ifstream(path)) {
      fail_at(entry.where, path.string() + ": cannot be read; the path is relative to the sweep's folder");
    }
    return path;
  }

  void read_trace(const MapEntry& entry) {
    sweep_.inputs.trace = readable(entry);
    try {
      offload::Trace::read(sweep_.inputs.trace);
    } catch (const CheckpointError& error) {
      fail_at(entry.where, error.what());
    }
    inputs_ += hex(fnv1a(read_text(sweep_.inputs.trace)));
  }

  void add_usual_baseline(const MapEntry* prompt) {
    if (std::ranges::find(models_, kUsualBaseline, &ModelEntry::name) != models_.end()) return;
    if (!sweep_.inputs.prompt_file.empty()) {
      fail_at(prompt->where,
              "prompts from a file need a tokenizer, which the usual baseline, Llama-3.1-8B with synthetic weights, "
              "has not; name a 'baseline' that has one, or leave 'prompt.file' out for random ids");
    }
    ModelEntry entry = models_.front();
    entry.name = kUsualBaseline;
    for (std::string& text : usual_baseline_overrides()) entry.set.push_back(std::move(text));
    models_.push_back(std::move(entry));
  }

  void read_prompt(const YAML::Node& node) {
    const std::vector<MapKey> keys = {{"file", {forms::text("the path of a text")}},
                                      {"seed", {forms::integer(0, ~uint64_t{0})}}};
    const YamlMap map(source_, "prompt", node, keys);
    if (const MapEntry* file = map.find("file")) {
      sweep_.inputs.prompt_file = readable(*file);
      inputs_ += hex(fnv1a(read_text(sweep_.inputs.prompt_file)));
    }
    sweep_.inputs.prompt_seed = map.get<uint64_t>("seed", 0);
  }

  void read_rates(const YAML::Node& node) {
    const ValueForm rate = forms::number_above(0, kMostGbPerS);
    const std::vector<MapKey> keys = {{"device_read_gb_per_s", {rate}},
                                      {"link_gb_per_s", {rate}},
                                      {"cpu_read_gb_per_s", {rate}},
                                      {"both_gb_per_s", {rate}}};
    const YamlMap map(source_, "rates", node, keys);
    const auto take = [&](const char* name, std::optional<double>& into) {
      if (const MapEntry* entry = map.find(name)) into = entry->value.get<double>();
    };
    take("device_read_gb_per_s", sweep_.rates.device_read);
    take("link_gb_per_s", sweep_.rates.link);
    take("cpu_read_gb_per_s", sweep_.rates.cpu_read);
    take("both_gb_per_s", sweep_.rates.both);
  }

  static void check_list(const std::string& name, const MapEntry& list) {
    if (list.node.IsSequence() && list.node.size() > 0) return;
    const std::string found = list.node.IsSequence() ? "an empty list" : describe_value(list.node);
    fail_at(list.where, "'" + name + "' must be a list of maps, but is " + found);
  }

  void read_models(const MapEntry& list) {
    check_list("models", list);
    for (size_t i = 0; i < list.node.size(); ++i) {
      const YamlMap map(source_, "models[" + std::to_string(i) + "]", list.node[i], model_keys());
      const MapEntry& name = map.at("name");
      ModelEntry entry{name.value.get<std::string>(), resolved(map.at("config")), "",
                       map.get<std::vector<std::string>>("set", {})};
      if (std::ranges::find(models_, entry.name, &ModelEntry::name) != models_.end()) {
        fail_at(name.where, "two models are called '" + entry.name + "'");
      }
      entry.text = read_text(entry.config);
      models_.push_back(std::move(entry));
    }
  }

  const ModelEntry& model(const std::string& name, const std::string& where) const {
    const auto found = std::ranges::find(models_, name, &ModelEntry::name);
    if (found != models_.end()) return *found;
    std::string known;
    for (const ModelEntry& entry : models_) known += (known.empty() ? "" : ", ") + entry.name;
    fail_at(where, "no model is called '" + shorten(name) + "'; there are: " + known);
  }

  void read_block(const std::string& path, const YAML::Node& node) {
    const YamlMap map(source_, path, node, block_keys());
    const json set = map.get("set", json::array());
    for (const json& name : values_of(map, "models", {})) {
      const ModelEntry& entry = model(name.get<std::string>(), map.at("models").where);
      Point point;
      point.model = entry.name;
      point.config = entry.config;
      point.overrides = entry.set;
      combine(map, 0, point, [&](Point finished) {
        for (const json& text : set) finished.overrides.push_back(text.get<std::string>());
        if (!set.empty()) finished.settings["set"] = set;
        any_synthetic_ |= checked_config(finished, map.where()).model.is_synthetic();
        add_workloads(map, finished);
      });
    }
  }

  void combine(const YamlMap& map, size_t axis, const Point& point,
               const std::function<void(Point)>& finished) const {
    if (axis == axes().size()) return finished(point);
    const Axis& here = axes()[axis];
    if (map.find(here.name) == nullptr) return combine(map, axis + 1, point, finished);
    for (const json& value : values_of(map, here.name, {})) {
      Point next = point;
      next.settings[here.name] = value;
      for (std::string& text : axis_overrides(here, as_text(value)))
        next.overrides.push_back(std::move(text));
      combine(map, axis + 1, next, finished);
    }
  }

  // The batch varies least often: another one is another load.
  void add_workloads(const YamlMap& map, const Point& point) {
    const Workload usual;
    for (const json& batch : values_of(map, "batch", json::array({usual.batch}))) {
      for (const json& prompt : values_of(map, "prompt_tokens", json::array({usual.prompt_tokens}))) {
        for (const json& generated :
             values_of(map, "generated_tokens", json::array({usual.generated_tokens}))) {
          add(map, point, {prompt.get<int64_t>(), generated.get<int64_t>(), batch.get<int>()});
        }
      }
    }
  }

  // The same point may stand in two blocks; it is measured once.
  void add(const YamlMap& map, const Point& point, const Workload& workload) {
    if (std::ranges::find(workloads_, workload) == workloads_.end()) workloads_.push_back(workload);
    const char* const longest = map.find("prompt_tokens") != nullptr ? "prompt_tokens" : "generated_tokens";
    const MapEntry* const entry = map.find(longest);
    const Point named = with_workload(point, workload, entry == nullptr ? map.where() : entry->where);
    if (std::ranges::find(sweep_.points, named.id, &Point::id) == sweep_.points.end()) {
      sweep_.points.push_back(named);
    }
  }

  // Configuration mistakes are found now, not after an hour of measuring.
  static Config checked_config(const Point& point, const std::string& where) {
    try {
      return load_config(point.config, point.overrides);
    } catch (const ConfigError& error) {
      fail_at(where, "the model '" + point.model + "' cannot be configured so: " + error.what());
    }
  }

  Point with_workload(Point point, const Workload& workload, const std::string& where) const {
    point.workload = workload;
    if (workload.batch > 1)
      point.overrides.push_back(std::string(kSequences) + "=" + std::to_string(workload.batch));
    const int64_t context = checked_config(point, where).memory.context;
    if (workload.prompt_tokens + workload.generated_tokens > context) {
      fail_at(where, std::to_string(workload.prompt_tokens) + " + " +
                         std::to_string(workload.generated_tokens) + " tokens are more than the model '" +
                         point.model + "' has room for: its memory.context is " + std::to_string(context) +
                         "; raise it, or ask for fewer");
    }
    name_it(point);
    return point;
  }

  void name_it(Point& point) const {
    const Json workload = workload_json(point.workload);
    point.key = Json{{"model", point.model}, {"settings", point.settings}, {"workload", workload}}.dump();
    Json all = {{"config", model(point.model, "").text},
                {"overrides", point.overrides},
                {"key", point.key},
                {"round", round_name(point.round)},
                {"warmup", sweep_.warmup},
                {"repeats", sweep_.repeats},
                {"prompt", sweep_.inputs.prompt_file.string()},
                {"seed", sweep_.inputs.prompt_seed},
                {"trace", sweep_.inputs.trace.string()},
                {"inputs", inputs_},
                {"rates", rates_json()}};
    point.id = hex(fnv1a(all.dump()));
  }

  // A bound that was computed with other rates is another result.
  Json rates_json() const {
    Json given = Json::array();
    const Rates& rates = sweep_.rates;
    for (const auto& rate : {rates.device_read, rates.link, rates.cpu_read, rates.both})
      given.push_back(rate ? Json(*rate) : Json());
    return given;
  }

  void arrange(const ModelEntry& baseline, const std::string& where) {
    std::ranges::stable_sort(workloads_, {}, &Workload::batch);
    Point point;
    point.model = baseline.name;
    point.config = baseline.config;
    point.overrides = baseline.set;
    const auto round = [&](Round which) {
      std::vector<Point> of_round;
      for (const Workload& workload : workloads_) {
        point.round = which;
        of_round.push_back(with_workload(point, workload, where));
      }
      return of_round;
    };
    std::vector<Point>& points = sweep_.points;
    // Between two loads, so that the baseline in the middle causes no further one.
    size_t middle = points.size() / 2;
    while (middle < points.size() && middle > 0 && points[middle].overrides == points[middle - 1].overrides)
      ++middle;
    const std::vector<Point> first = round(Round::first), between = round(Round::middle),
                             last = round(Round::last);
    points.insert(points.begin() + static_cast<std::ptrdiff_t>(middle), between.begin(), between.end());
    points.insert(points.begin(), first.begin(), first.end());
    points.insert(points.end(), last.begin(), last.end());
    for (Point& each : points) each.label = label(each);
  }

  std::string label(const Point& point) const {
    std::string text = point.model;
    for (const auto& [name, value] : point.settings.items()) {
      if (name == "resident" && value.is_number()) {
        char share[32];
        std::snprintf(share, sizeof share, "%g %% resident", 100 * value.get<double>());
        text += std::string(", ") + share;
      } else if (name == "format" || name == "experts" || name == "policy" || name == "miss") {
        text += ", " + as_text(value);
      } else if (name == "set") {
        for (const auto& each : value) text += ", " + each.get<std::string>();
      } else {
        text += ", " + (name == "prefetch_depth" ? "prefetch" : name) + " " + as_text(value);
      }
    }
    if (workloads_.size() > 1) {
      text += ", " + std::to_string(point.workload.prompt_tokens) + " + " +
              std::to_string(point.workload.generated_tokens) + " tokens";
      if (point.workload.batch > 1) text += " × " + std::to_string(point.workload.batch);
    }
    return text;
  }

  const YamlSource source_;
  const std::filesystem::path folder_;
  Sweep sweep_;
  std::vector<ModelEntry> models_;
  std::vector<Workload> workloads_;
  std::string inputs_;          // hashes of the files that prompts and routing come from
  bool any_synthetic_ = false;  // of the models that points have
};

}  // namespace

const char* round_name(Round round) {
  switch (round) {
    case Round::none:
      return "none";
    case Round::first:
      return "first";
    case Round::middle:
      return "middle";
    case Round::last:
      return "last";
  }
  return "?";
}

Sweep load_sweep(const std::filesystem::path& file) {
  return Reader(file).read(parse_yaml({file.string()}, read_text(file)));
}

}  // namespace lighter::bench
