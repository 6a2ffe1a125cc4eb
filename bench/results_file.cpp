#include "bench/results_file.h"

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <iterator>
#include <system_error>

#include "runtime/error.h"

namespace lighter::bench {
namespace {

constexpr size_t kShort = 140;

std::string dumped(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

void print(const Json& json, size_t depth, std::string& out) {
  const bool numbers = json.is_array() && (json.empty() || json.front().is_number());
  if (!json.is_structured() || numbers) {
    out += dumped(json);
    return;
  }
  if (json.size() < 8) {
    if (const std::string line = dumped(json); line.size() <= kShort) {
      out += line;
      return;
    }
  }
  out += json.is_array() ? "[" : "{";
  bool first = true;
  for (const auto& [name, value] : json.items()) {
    out += (first ? "\n" : ",\n") + std::string(depth + 1, ' ');
    first = false;
    if (json.is_object()) out += dumped(name) + ": ";
    print(value, depth + 1, out);
  }
  out += "\n" + std::string(depth, ' ') + (json.is_array() ? "]" : "}");
}

template <typename Names = std::initializer_list<const char*>>
bool has_all(const Json& json, const Names& names) {
  return json.is_object() &&
         std::ranges::all_of(names, [&](const char* name) { return json.contains(name); });
}

bool is_figure(const Json& json) {
  return json.is_null() || (has_all(json, {"median", "min", "max", "count"}) && json["median"].is_number());
}

bool is_memory(const Json& json) {
  return json.is_null() || (has_all(json, {"device_peak_bytes", "host_peak_bytes"}) &&
                            json["device_peak_bytes"].is_number() && json["host_peak_bytes"].is_number());
}

// What resuming and comparing read without looking.
bool whole(const Json& json) {
  if (!has_all(json,
               {"machine", "drift", "points", "complete", "interrupted", "left_behind_bytes", "repeats"}) ||
      !json["points"].is_array())
    return false;
  if (!has_all(json["machine"], {"gpu", "cpu", "cores", "rates"})) return false;
  if (!has_all(json["machine"]["rates"], {"device_read", "link", "cpu_read", "both"})) return false;
  if (!json["drift"].is_null() && !has_all(json["drift"], {"share", "workloads"})) return false;
  return std::ranges::all_of(json["points"], [](const Json& point) {
    if (!has_all(point, {"id", "key", "label", "model", "round", "workload", "settings", "status", "error",
                         "facts", "runs", "memory", "timeline", "penalty", "bound", "decode",
                         "decode_tokens_per_s", "prefill_tokens_per_s", "time_to_first_token_s"})) {
      return false;
    }
    const bool texts = point["id"].is_string() && point["key"].is_string() && point["label"].is_string();
    const bool figures = is_figure(point["decode_tokens_per_s"]) &&
                         is_figure(point["prefill_tokens_per_s"]) &&
                         is_figure(point["time_to_first_token_s"]);
    const bool known = has_all(point["facts"], kComparedFacts);
    return texts && figures && is_memory(point["memory"]) && (point["status"] != "measured" || known);
  });
}

}  // namespace

std::string results_text(const Json& results) {
  std::string text;
  print(results, 0, text);
  return text + "\n";
}

Json read_results(const std::filesystem::path& file) {
  std::error_code error;
  if (std::filesystem::is_directory(file, error))
    throw ConfigError(file.string() + ": is a folder, not results.json");
  errno = 0;
  std::ifstream in(file, std::ios::binary);
  const std::string text{std::istreambuf_iterator<char>(in), {}};
  if (!in.is_open() || in.bad()) {
    throw ConfigError(file.string() + ": cannot be read: " + std::generic_category().message(errno));
  }
  Json json = Json::parse(text, nullptr, false);
  if (json.is_discarded()) throw ConfigError(file.string() + ": is not valid JSON");
  if (!json.is_object() || json.value("format", "") != "lighter-bench" || !json.contains("points")) {
    throw ConfigError(file.string() + ": was not written by `lighter bench`");
  }
  if (json.value("version", 0) != kResultsVersion) {
    throw ConfigError(file.string() + ": is of version " + json.value("version", Json()).dump() +
                      ", this program reads " + std::to_string(kResultsVersion));
  }
  if (!whole(json)) {
    throw ConfigError(file.string() +
                      ": lacks what `lighter bench` writes (bench/results.schema.json); it was changed "
                      "since, or is of another version");
  }
  return json;
}

void write_atomically(const std::filesystem::path& file, const std::string& text) {
  const std::filesystem::path part = file.string() + ".part";
  errno = 0;
  std::ofstream out(part, std::ios::binary | std::ios::trunc);
  out << text;
  out.close();
  if (!out)
    throw ConfigError(part.string() + ": cannot be written: " + std::generic_category().message(errno));
  std::error_code error;
  std::filesystem::rename(part, file, error);
  if (error) throw ConfigError(file.string() + ": cannot be written: " + error.message());
}

}  // namespace lighter::bench
