#include "runtime/config/yaml_values.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <fstream>
#include <iterator>
#include <optional>
#include <regex>
#include <system_error>

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
    case ValueForm::Kind::map:
      break;
  }
  return nullptr;
}

}  // namespace

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

std::string YamlSource::at(const YAML::Mark& mark) const {
  if (is_override) return name;
  const int line = mark.is_null() ? 0 : mark.line, column = mark.is_null() ? 0 : mark.column;
  return name + ":" + std::to_string(line + 1) + ":" + std::to_string(column + 1);
}

void fail_at(const std::string& where, const std::string& what) {
  throw ConfigError(where + ": " + what);
}

std::string read_text(const std::filesystem::path& file) {
  const std::string advice = "; check the path of the configuration file";
  std::error_code error;
  if (std::filesystem::is_directory(file, error)) fail_at(file.string(), "is a folder" + advice);
  errno = 0;
  std::ifstream stream(file, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(stream), {}};
  if (!stream.is_open() || stream.bad()) {
    fail_at(file.string(), "cannot be read: " + std::generic_category().message(errno) + advice);
  }
  return text;
}

YAML::Node parse_yaml(const YamlSource& source, const std::string& text) try {
  const std::vector<YAML::Node> documents = YAML::LoadAll(text);
  if (documents.size() > 1) {
    fail_at(source.at(documents[1].Mark()), "more than one YAML document; keep one");
  }
  return documents.empty() ? YAML::Node() : documents.front();
} catch (const YAML::Exception& error) {
  fail_at(source.at(error.mark), "this is not valid YAML: " + error.msg);
}

namespace {

[[noreturn]] void refuse(const YamlSource& source, const std::string& name,
                         const std::vector<ValueForm>& forms, const YAML::Node& node) {
  const bool wants_text = std::ranges::any_of(forms, [](const ValueForm& form) {
    return form.kind == ValueForm::Kind::text && form.pattern.empty();
  });
  const bool needs_quotes = wants_text && node.IsScalar() && !is_text(node);
  fail_at(source.at(node.Mark()), "'" + name + "' must be " + describe_forms(forms) + ", but is " +
                                      describe_value(node) + (needs_quotes ? "; put it in quotes" : ""));
}

json match_list(const YamlSource& source, const std::string& name, const ValueForm& form,
                const YAML::Node& node) {
  json values = json::array();
  for (const YAML::Node& item : node) {
    json value = item.IsScalar() ? match_scalar(form.item.front(), item) : json();
    if (value.is_null()) refuse(source, name + "[" + std::to_string(values.size()) + "]", form.item, item);
    values.push_back(std::move(value));
  }
  return values;
}

json match_map(const YamlSource& source, const std::string& name, const ValueForm& form,
               const YAML::Node& node) {
  json values = json::object();
  for (const auto& entry : node) {
    const std::string where = source.at(entry.first.Mark());
    const std::string key = entry.first.IsScalar() ? entry.first.Scalar() : "";
    if (!accepts_text(form, key)) {
      fail_at(where, "'" + name + "' must be " + form.describe() + "; its key " +
                         describe_value(entry.first) + " is not that");
    }
    for (const auto& other : values.items()) {
      const std::string conflict = form.conflict == nullptr ? "" : form.conflict(key, other.key());
      if (key == other.key() || !conflict.empty()) {
        fail_at(where, "'" + name + "': " + (conflict.empty() ? "'" + key + "' is there twice" : conflict));
      }
    }
    json value = entry.second.IsScalar() ? match_scalar(form.item.front(), entry.second) : json();
    if (value.is_null()) refuse(source, name + "[\"" + key + "\"]", form.item, entry.second);
    values[key] = std::move(value);
  }
  return values;
}

}  // namespace

json match_value(const YamlSource& source, const std::string& name, const std::vector<ValueForm>& forms,
                 const YAML::Node& node) {
  for (const ValueForm& form : forms) {
    if (node.IsSequence() && form.kind == ValueForm::Kind::list) return match_list(source, name, form, node);
    if (node.IsMap() && node.size() > 0 && form.kind == ValueForm::Kind::map) {
      return match_map(source, name, form, node);
    }
    if (!node.IsScalar()) continue;
    if (json value = match_scalar(form, node); !value.is_null()) return value;
  }
  refuse(source, name, forms, node);
}

}  // namespace lighter
