#include "bench/results_file.h"

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

}  // namespace

std::string results_text(const Json& results) {
  std::string text;
  print(results, 0, text);
  return text + "\n";
}

Json read_results(const std::filesystem::path& file) {
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
