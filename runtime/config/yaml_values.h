// What any YAML file of lighter's is read with: places for messages, and values matched against what a key
// accepts. Pure functions but for read_text(); errors are ConfigErrors that begin with the place.
#pragma once

#include <yaml-cpp/yaml.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/config/value_form.h"

namespace lighter {

// Where a value stands: "file:line:column" (both from 1), or "--set key=value" for all parts of an override.
struct YamlSource {
  std::string name;
  bool is_override = false;

  std::string at(const YAML::Mark& mark) const;
};

[[noreturn]] void fail_at(const std::string& where, const std::string& what);

// Throws ConfigError, as do all below.
std::string read_text(const std::filesystem::path& file);
// Null for an empty text. One document.
YAML::Node parse_yaml(const YamlSource& source, const std::string& text);

// The value of a scalar or a list if one of the forms accepts it. name: of the key, for the message.
nlohmann::json match_value(const YamlSource& source, const std::string& name,
                           const std::vector<ValueForm>& forms, const YAML::Node& node);

// For messages.
std::string shorten(const std::string& text);
std::string describe_value(const YAML::Node& node);
std::string describe_forms(const std::vector<ValueForm>& forms);

}  // namespace lighter
