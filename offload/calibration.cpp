#include "offload/calibration.h"

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "runtime/error.h"

namespace lighter::offload {
namespace {

using Json = nlohmann::ordered_json;

// The file's form, once for writing and reading: visit(name, member) for each.
template <typename Costs, typename Visit>
void visit_costs(Costs& costs, Visit& visit) {
  visit("layer_us", costs.layer);
  visit("moe_layer_us", costs.moe_layer);
  visit("miss_layer_us", costs.miss_layer);
  visit("attention_us", costs.attention);
  visit("step_us", costs.step);
}

template <typename Fields, typename Visit>
void visit_fields(Fields& c, Visit& visit) {
  visit("device", c.device);
  visit("cpu", c.cpu);
  visit("threads", c.threads);
  visit("cuda", c.cuda);
  visit("date", c.date);
  visit("device_read", c.device_read);
  visit("host_read", c.host_read);
  visit("link", c.link);
  visit("both_read", c.both_read);
  visit("zero_copy", c.zero_copy);
  visit("kernels", c.kernels);
  visit("cpu_experts", c.cpu_experts);
  visit("cpu_experts_of_4", c.cpu_experts_of_4);
  visit("beside_copies", c.beside_copies);
  visit("beside_zero_copy", c.beside_zero_copy);
  visit("kv_read", c.kv_read);
  visit("tensor_tflops", c.tensor_tflops);
  visit("graph", c.graph);
  visit("eager", c.eager);
}

template <typename Pair, typename Visit>
void visit_pair(Pair& pair, Visit& visit) {
  visit("cpu", pair.cpu);
  visit("device", pair.device);
}

template <typename Formats, typename Visit>
void visit_formats(Formats& formats, Visit& visit) {
  for (const auto format : {SliceEncoding::dense, SliceEncoding::int8, SliceEncoding::int4}) {
    visit(std::string(encoding_name(format)), formats[format]);
  }
}

class Writer {
 public:
  Json json = Json::object();

  template <typename Value>
  void operator()(const std::string& name, const Value& value) {
    json[name] = of(value);
  }

 private:
  template <typename Value>
  static Json of(const Value& value) {
    return value;
  }
  template <typename Value>
  static Json of(const std::optional<Value>& value) {
    return value ? of(*value) : Json();
  }
  static Json of(const SharedRate& pair) {
    Writer inner;
    visit_pair(pair, inner);
    return inner.json;
  }
  static Json of(const FixedCosts& costs) {
    Writer inner;
    visit_costs(costs, inner);
    return inner.json;
  }
  template <typename Figure>
  static Json of(const ByFormat<Figure>& formats) {
    Writer inner;
    visit_formats(formats, inner);
    return inner.json;
  }
};

// Takes an object apart; where: its path within the file.
class Reader {
 public:
  Reader(const Json& json, std::string where) : json_(json), where_(std::move(where)) {
    if (!json.is_object()) throw ConfigError(where_ + " must be an object");
  }

  template <typename Value>
  void operator()(const std::string& name, Value& value) {
    known_.insert(name);
    const std::string path = where_.empty() ? name : where_ + "." + name;
    const auto found = json_.find(name);
    if (found == json_.end()) throw ConfigError(path + " is missing");
    take(*found, path, value);
  }

  void refuse_others() const {
    for (const auto& [name, value] : json_.items()) {
      if (!known_.contains(name) && name != "version") throw ConfigError("'" + name + "' is not known");
    }
  }

 private:
  static void take(const Json& json, const std::string& path, std::string& value) {
    if (!json.is_string()) throw ConfigError(path + " must be a text");
    value = json.get<std::string>();
  }
  static void take(const Json& json, const std::string& path, bool& value) {
    if (!json.is_boolean()) throw ConfigError(path + " must be true or false");
    value = json.get<bool>();
  }
  static void take(const Json& json, const std::string& path, int& value) {
    if (!json.is_number_integer() || json.get<int64_t>() < 1 || json.get<int64_t>() > 65536) {
      throw ConfigError(path + " must be a count from 1 to 65536");
    }
    value = json.get<int>();
  }
  // Rates divide, so 0 is none; costs may be 0.
  static void take(const Json& json, const std::string& path, double& value) {
    const bool cost = path.ends_with("_us");
    if (json.is_number()) value = json.get<double>();
    if (!json.is_number() || !std::isfinite(value) || value < 0 || (value == 0 && !cost)) {
      throw ConfigError(path + " must be a number " + (cost ? "from 0" : "above 0"));
    }
  }
  template <typename Value>
  static void take(const Json& json, const std::string& path, std::optional<Value>& value) {
    if (json.is_null()) return;
    take(json, path, value.emplace());
  }
  static void take(const Json& json, const std::string& path, SharedRate& pair) {
    Reader inner(json, path);
    visit_pair(pair, inner);
    inner.refuse_others();
  }
  static void take(const Json& json, const std::string& path, FixedCosts& costs) {
    Reader inner(json, path);
    visit_costs(costs, inner);
    inner.refuse_others();
  }
  template <typename Figure>
  static void take(const Json& json, const std::string& path, ByFormat<Figure>& formats) {
    Reader inner(json, path);
    visit_formats(formats, inner);
    inner.refuse_others();
  }

  const Json& json_;
  const std::string where_;
  std::set<std::string> known_;
};

}  // namespace

std::string Calibration::source() const {
  if (measured()) return "measured on " + device + ", " + date;
  return "not measured; figures of " + device;
}

Rates Calibration::ceilings() const {
  return {device_read, link, host_read, both_read};
}

Calibration default_calibration(bool cuda) {
  Calibration c;
  c.cuda = cuda;
  if (!cuda) {
    // Two cores of a virtual machine with AVX2; fixed costs: what the shipped model's steps take there.
    c.device = "a small machine without a GPU";
    c.cpu = "two cores";
    c.threads = 2;
    c.device_read = c.host_read = 8;
    c.link = 4;
    c.kernels.figures = {7, 7, 6};
    c.cpu_experts.figures = {std::nullopt, 7, 6};
    c.cpu_experts_of_4.figures = {std::nullopt, 5, 4};
    c.kv_read = 2;
    c.tensor_tflops = 0.05;
    c.graph = c.eager = {500, 500, 200, 50, 200};
    return c;
  }
  // One H100 80GB HBM3 SXM on PCIe 5, 16 cores (15 for the experts), 2026-11, as `lighter calibrate` measured
  // it. Fixed costs: what remains after the rates of the steps in bench/results/h100.json (graph), and of
  // earlier eager ones.
  c.device = "an H100 80GB on PCIe 5 with 16 cores";
  c.cpu = "16 cores with AVX-512 VNNI";
  c.threads = 15;
  c.device_read = 3020;
  c.host_read = 142;
  c.link = 54.4;
  c.both_read = 158.6;
  c.zero_copy = 49.9;
  c.kernels.figures = {2900, 2800, 2550};
  c.cpu_experts.figures = {std::nullopt, 112, 97};
  c.cpu_experts_of_4.figures = {std::nullopt, 95, 61};
  c.beside_copies.figures = {std::nullopt, SharedRate{93, 47}, SharedRate{83, 47}};
  c.beside_zero_copy.figures = {std::nullopt, SharedRate{95, 46}, SharedRate{85, 46}};
  c.kv_read = 645;
  c.tensor_tflops = 870;
  c.graph = {0.5, 1, 35, 5.5, 8};
  c.eager = {200, 120, 60, 20, 50};
  return c;
}

std::optional<Calibration> read_calibration(const std::filesystem::path& file) {
  std::ifstream stream(file);
  if (!stream) throw ConfigError(file.string() + ": cannot be read");
  const Json json = Json::parse(stream, nullptr, false);
  try {
    if (json.is_discarded() || !json.is_object()) throw ConfigError("not a JSON object");
    if (!json.contains("version") || !json["version"].is_number_integer()) {
      throw ConfigError("version is missing");
    }
    if (json["version"] != Calibration::kVersion) return std::nullopt;
    Calibration calibration;
    Reader reader(json, "");
    visit_fields(calibration, reader);
    reader.refuse_others();
    return calibration;
  } catch (const ConfigError& error) {
    throw ConfigError(file.string() + ": " + error.what() + "; make it anew with lighter calibrate");
  }
}

void write_calibration(const Calibration& calibration, const std::filesystem::path& file) {
  Writer writer;
  writer("version", Calibration::kVersion);
  visit_fields(calibration, writer);
  std::error_code error;
  if (file.has_parent_path()) std::filesystem::create_directories(file.parent_path(), error);
  std::ofstream stream(file);
  stream << writer.json.dump(2) << "\n";
  stream.close();
  if (!stream) throw ConfigError(file.string() + ": cannot be written");
}

std::string why_other_machine(const Calibration& calibration, const Machine& machine) {
  if (!machine.device.empty() && calibration.device != machine.device) {
    return "it is of the device " + calibration.device + ", this is " + machine.device;
  }
  if (calibration.cpu != machine.cpu)
    return "it is of the CPU " + calibration.cpu + ", this is " + machine.cpu;
  if (calibration.threads == machine.threads) return "";
  return "it is of " + std::to_string(calibration.threads) + " threads, here are " +
         std::to_string(machine.threads);
}

std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown";
}

}  // namespace lighter::offload
