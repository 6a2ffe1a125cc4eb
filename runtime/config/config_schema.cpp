#include "runtime/config/config_schema.h"

#include <algorithm>
#include <string>

#include "runtime/config/config_keys.h"

namespace lighter {
namespace {

using nlohmann::json;

json form_schema(const ValueForm& form) {
  switch (form.kind) {
    case ValueForm::Kind::boolean:
      return {{"type", "boolean"}};
    case ValueForm::Kind::integer:
      if (!form.integers.empty()) return {{"enum", form.integers}};
      return {{"type", "integer"}, {"minimum", form.min_integer}, {"maximum", form.max_integer}};
    case ValueForm::Kind::number:
      return {{"type", "number"},
              {form.above_min ? "exclusiveMinimum" : "minimum", form.min_number},
              {"maximum", form.max_number}};
    case ValueForm::Kind::word:
      return {{"enum", form.words}};
    case ValueForm::Kind::text:
      if (form.pattern.empty()) return {{"type", "string"}, {"minLength", 1}};
      return {{"type", "string"}, {"pattern", form.pattern}};
    case ValueForm::Kind::list:
      return {{"type", "array"}, {"items", form_schema(form.item.front())}};
    case ValueForm::Kind::map:
      return {{"type", "object"},
              {"patternProperties", {{form.pattern, form_schema(form.item.front())}}},
              {"additionalProperties", false},
              {"minProperties", 1}};
  }
  return json::object();
}

json key_schema(const ConfigKey& key) {
  json schema;
  if (key.forms.size() == 1 && key.required) {
    schema = form_schema(key.forms.front());
  } else {
    json any = json::array();
    for (const ValueForm& form : key.forms) any.push_back(form_schema(form));
    if (!key.required) any.push_back({{"type", "null"}});  // "top_k: " is a way to say "not set"
    schema["anyOf"] = any;
  }
  schema["description"] = key.description;
  if (!key.fallback.is_null()) schema["default"] = key.fallback;
  return schema;
}

// The schema object of the section or key at a dotted path.
json& at_path(json& root, std::string_view path) {
  json* node = &root;
  while (!path.empty()) {
    const size_t dot = path.find('.');
    node = &(*node)["properties"][std::string(path.substr(0, dot))];
    path.remove_prefix(dot == path.npos ? path.size() : dot + 1);
  }
  return *node;
}

// Requires the last part of path in its section, and that section in the section around it, up to the file.
void require(json& root, std::string_view path) {
  while (!path.empty()) {
    const size_t dot = path.rfind('.');
    const std::string_view section = dot == path.npos ? std::string_view() : path.substr(0, dot);
    json& node = at_path(root, section);
    node["type"] = "object";
    json& required = node["required"];
    const std::string name(path.substr(dot == path.npos ? 0 : dot + 1));
    if (std::find(required.begin(), required.end(), name) == required.end()) required.push_back(name);
    path = section;
  }
}

}  // namespace

json config_schema() {
  json root;
  for (const ConfigSection& section : config_sections()) {
    json& node = at_path(root, section.path);
    node["type"] = section.path.empty() ? json("object") : json({"object", "null"});
    node["description"] = section.description;
    node["additionalProperties"] = false;
  }
  for (const ConfigKey& key : config_keys()) at_path(root, key.path) = key_schema(key);
  for (const ConfigKey& key : config_keys()) {
    if (key.required) require(root, key.path);
  }

  // Exactly one of the two, and a null is none.
  require(root, "model");
  json& model = at_path(root, "model");
  model["type"] = "object";
  json one_of = json::array();
  for (const char* name : {"path", "synthetic"}) {
    one_of.push_back({{"required", {name}}, {"properties", {{name, {{"type", "string"}}}}}});
  }
  model["oneOf"] = one_of;

  root["$schema"] = "https://json-schema.org/draft/2020-12/schema";
  root["title"] = "lighter";
  return root;
}

}  // namespace lighter
