// Reading a configuration: YAML nodes → values that the table of keys accepts → Config.
// Values are gathered first and assigned at the end, so that a later null can take an earlier one back and
// rules across keys can still say where each value came from.
#include "runtime/config/config.h"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <fstream>
#include <iterator>
#include <map>
#include <regex>
#include <system_error>

#include "runtime/config/config_keys.h"
#include "runtime/error.h"

namespace lighter {
namespace {

using nlohmann::json;

// std::regex recurses once per character; no real setting with a pattern is this long.
constexpr size_t kMaxPatternText = 2000;

bool is_quoted(const YAML::Node& node) {
  return node.Tag() == "!" || node.Tag() == "tag:yaml.org,2002:str";
}

std::optional<uint64_t> parse_integer(std::string_view text) {
  if (text.starts_with('+')) text.remove_prefix(1);
  uint64_t value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::optional<double> parse_number(std::string_view text) {
  // from_chars also takes "inf" and "nan", which are plain texts in YAML.
  if (text.find_first_not_of("0123456789+-.eE") != text.npos) return std::nullopt;
  if (text.starts_with('+')) text.remove_prefix(1);
  double value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::optional<bool> parse_boolean(std::string_view text) {
  if (text == "true" || text == "True" || text == "TRUE") return true;
  if (text == "false" || text == "False" || text == "FALSE") return false;
  return std::nullopt;
}

// YAML types a plain scalar by its look; only what is nothing else is text, as in the schema.
bool is_text(const YAML::Node& node) {
  return is_quoted(node) || (!parse_number(node.Scalar()) && !parse_boolean(node.Scalar()));
}

bool accepts_text(const ValueForm& form, const std::string& text) {
  if (form.pattern.empty()) return !text.empty();
  if (text.size() > kMaxPatternText || !std::regex_search(text, std::regex(form.pattern))) return false;
  return form.accepts == nullptr || form.accepts(text);
}

// The value of a scalar if the form accepts it, null otherwise.
json match_scalar(const ValueForm& form, const YAML::Node& node) {
  const std::string& text = node.Scalar();
  switch (form.kind) {
    case ValueForm::Kind::boolean:
      if (auto value = parse_boolean(text); value && !is_quoted(node)) return *value;
      return nullptr;
    case ValueForm::Kind::integer: {
      const auto value = parse_integer(text);
      if (!value || is_quoted(node)) return nullptr;
      const bool known = form.integers.empty()
                             ? *value >= form.min_integer && *value <= form.max_integer
                             : std::ranges::find(form.integers, *value) != form.integers.end();
      return known ? json(*value) : json();
    }
    case ValueForm::Kind::number: {
      const auto value = parse_number(text);
      if (!value || is_quoted(node) || *value > form.max_number) return nullptr;
      const bool above = form.above_min ? *value > form.min_number : *value >= form.min_number;
      return above ? json(*value) : json();
    }
    case ValueForm::Kind::word:
      return std::ranges::find(form.words, text) != form.words.end() ? json(text) : json();
    case ValueForm::Kind::text:
      return is_text(node) && accepts_text(form, text) ? json(text) : json();
    case ValueForm::Kind::list:
      break;
  }
  return nullptr;
}

std::string shorten(const std::string& text) {
  return text.size() <= 80 ? text : text.substr(0, 77) + "...";
}

std::string describe_value(const YAML::Node& node) {
  if (node.IsMap()) return "a map";
  if (node.IsSequence()) return "a list";
  if (!node.IsScalar()) return "nothing";
  const std::string text = shorten(node.Scalar());
  return is_text(node) ? "'" + text + "'" : text;
}

std::string describe_forms(const std::vector<ValueForm>& forms) {
  std::string all;
  for (const ValueForm& form : forms) all += (all.empty() ? "" : ", or ") + form.describe();
  return all;
}

// Where a value stands: "file:line:column", or "--set key=value" for all parts of an override.
struct Source {
  std::string name;
  bool is_override = false;

  std::string at(const YAML::Mark& mark) const {
    if (is_override) return name;
    const int line = mark.is_null() ? 0 : mark.line, column = mark.is_null() ? 0 : mark.column;
    return name + ":" + std::to_string(line + 1) + ":" + std::to_string(column + 1);
  }
};

[[noreturn]] void fail(const std::string& where, const std::string& what) {
  throw ConfigError(where + ": " + what);
}

struct Setting {
  json value;
  std::string where;
  bool from_override = false;
};

class Reader {
 public:
  // path: a key, a section, or "" for the whole file; where: of the name, if it has one.
  void read(const Source& source, const std::string& path, const std::string& where, const YAML::Node& node) {
    if (find_section(path)) {
      read_section(source, path, where, node);
    } else if (const ConfigKey* key = find_key(path)) {
      read_key(source, *key, node);
    } else {
      const NearestKey nearest = nearest_key(path);
      fail(where, "unknown key '" + shorten(path) + "'; " +
                      (nearest.plausible ? "did you mean '" + nearest.path + "'?"
                                         : "the nearest known key is '" + nearest.path + "'"));
    }
  }

  Config finish(const std::filesystem::path& file) const;

 private:
  void read_section(const Source& source, const std::string& path, const std::string& where,
                    const YAML::Node& node) {
    section_where_[path] = where;
    const std::string prefix = path.empty() ? "" : path + ".";
    if (node.IsNull()) {
      std::erase_if(settings_, [&](const auto& entry) { return entry.first.starts_with(prefix); });
      return;
    }
    if (!node.IsMap()) {
      fail(source.at(node.Mark()), (path.empty() ? "the file" : "'" + path + "'") +
                                       " must be a map of keys, but is " + describe_value(node));
    }
    std::map<std::string, int> lines;
    for (const auto& entry : node) {
      const YAML::Node& name = entry.first;
      const std::string here = source.at(name.Mark());
      if (!name.IsScalar()) fail(here, "a key must be a name, but is " + describe_value(name));
      const std::string child = prefix + name.Scalar();
      const auto [first, is_new] = lines.emplace(name.Scalar(), name.Mark().line + 1);
      if (!is_new) {
        fail(here,
             "duplicate key '" + child + "'" +
                 (source.is_override ? "" : "; it is already on line " + std::to_string(first->second)));
      }
      read(source, child, here, entry.second);
    }
  }

  void read_key(const Source& source, const ConfigKey& key, const YAML::Node& node) {
    const std::string where = source.at(node.Mark());
    if (node.IsNull()) {
      settings_.erase(key.path);
      return;
    }
    settings_[key.path] = {match(source, key, node), where, source.is_override};
  }

  static json match(const Source& source, const ConfigKey& key, const YAML::Node& node) {
    for (const ValueForm& form : key.forms) {
      if (node.IsSequence() && form.kind == ValueForm::Kind::list) return match_list(source, key, form, node);
      if (!node.IsScalar()) continue;
      if (json value = match_scalar(form, node); !value.is_null()) return value;
    }
    refuse(source, "'" + key.path + "'", key.forms, node);
  }

  static json match_list(const Source& source, const ConfigKey& key, const ValueForm& form,
                         const YAML::Node& node) {
    json values = json::array();
    for (const YAML::Node& item : node) {
      json value = item.IsScalar() ? match_scalar(form.item.front(), item) : json();
      if (value.is_null()) {
        refuse(source, "'" + key.path + "[" + std::to_string(values.size()) + "]'", form.item, item);
      }
      values.push_back(std::move(value));
    }
    return values;
  }

  [[noreturn]] static void refuse(const Source& source, const std::string& name,
                                  const std::vector<ValueForm>& forms, const YAML::Node& node) {
    const bool wants_text = std::ranges::any_of(forms, [](const ValueForm& form) {
      return form.kind == ValueForm::Kind::text && form.pattern.empty();
    });
    const bool needs_quotes = wants_text && node.IsScalar() && !is_text(node);
    fail(source.at(node.Mark()), name + " must be " + describe_forms(forms) + ", but is " +
                                     describe_value(node) + (needs_quotes ? "; put it in quotes" : ""));
  }

  const Setting* find(const std::string& path) const {
    const auto found = settings_.find(path);
    return found == settings_.end() ? nullptr : &found->second;
  }

  // Where to point for a key that is not there: its section, else the start of the file.
  std::string section_of(const std::string& path) const {
    const auto found = section_where_.find(path.substr(0, path.rfind('.')));
    return found == section_where_.end() ? section_where_.at("") : found->second;
  }

  void check_rules() const;

  std::map<std::string, Setting> settings_;
  std::map<std::string, std::string> section_where_;
};

void Reader::check_rules() const {
  const Setting* path = find("model.path");
  const Setting* synthetic = find("model.synthetic");
  if (!path && !synthetic) {
    fail(section_of("model.path"), "no model: set 'model.path' to a checkpoint folder, or 'model.synthetic'");
  }
  if (path && synthetic) {
    const Setting* later = path->from_override && !synthetic->from_override ? path : synthetic;
    fail(later->where, "'model.path' and 'model.synthetic' are both set; keep one" +
                           std::string(later->from_override ? " (\"--set key=\" clears the other)" : ""));
  }
  for (const ConfigKey& key : config_keys()) {
    if (key.required && !find(key.path)) {
      fail(section_of(key.path), "'" + key.path + "' is missing; it must be " + describe_forms(key.forms));
    }
  }
  if (synthetic) return;
  const std::string advice = "; remove it, or use 'model.synthetic' instead of 'model.path'";
  for (const char* name : {"model.layers", "model.seed"}) {
    if (const Setting* setting = find(name)) {
      fail(setting->where, "'" + std::string(name) + "' is only for synthetic weights" + advice);
    }
  }
  const Setting* schedule = find("offload.routing.schedule");
  if (schedule && schedule->value != "router") {
    fail(schedule->where, "'offload.routing.schedule' must be router for a checkpoint, but is '" +
                              schedule->value.get<std::string>() + "'" + advice);
  }
}

Config Reader::finish(const std::filesystem::path& file) const {
  check_rules();
  Config config;
  for (const ConfigKey& key : config_keys()) {
    if (const Setting* setting = find(key.path)) key.assign(config, setting->value);
  }
  const auto resolve = [&](const std::filesystem::path& path) {
    return (file.parent_path() / path).lexically_normal();
  };
  const Setting* path = find("model.path");
  if (path && !path->from_override) config.model.path = resolve(config.model.path);
  const Setting* synthetic = find("model.synthetic");
  if (synthetic && !synthetic->from_override && config.model.synthetic.ends_with(".json")) {
    config.model.synthetic = resolve(config.model.synthetic).string();
  }
  return config;
}

std::string read_text(const std::filesystem::path& file) {
  const std::string advice = "; check the path of the configuration file";
  std::error_code error;
  if (std::filesystem::is_directory(file, error)) fail(file.string(), "is a folder" + advice);
  errno = 0;
  std::ifstream stream(file, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(stream), {}};
  if (!stream.is_open() || stream.bad()) {
    fail(file.string(), "cannot be read: " + std::generic_category().message(errno) + advice);
  }
  return text;
}

YAML::Node parse_yaml(const Source& source, const std::string& text) try {
  const std::vector<YAML::Node> documents = YAML::LoadAll(text);
  if (documents.size() > 1) {
    fail(source.at(documents[1].Mark()), "more than one YAML document; keep one");
  }
  return documents.empty() ? YAML::Node() : documents.front();
} catch (const YAML::Exception& error) {
  fail(source.at(error.mark), "this is not valid YAML: " + error.msg);
}

}  // namespace

Config load_config(const std::filesystem::path& file, std::span<const std::string> overrides) {
  Reader reader;
  const Source source{file.string()};
  const YAML::Node root = parse_yaml(source, read_text(file));
  reader.read(source, "", source.at(YAML::Mark::null_mark()), root);
  for (const std::string& text : overrides) {
    const Source override_source{"--set " + text, true};
    const size_t equals = text.find('=');
    if (equals == text.npos || equals == 0) fail(override_source.name, "write it as key.path=value");
    reader.read(override_source, text.substr(0, equals), override_source.name,
                parse_yaml(override_source, text.substr(equals + 1)));
  }
  return reader.finish(file);
}

}  // namespace lighter
