#include "runtime/config/config_schema.h"

#include <doctest/doctest.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <regex>
#include <set>

#include "runtime/config/config_keys.h"
#include "tests/runtime/yaml_file.h"

namespace fs = std::filesystem;
using nlohmann::json;
using namespace lighter;
using namespace lighter::test;

namespace {

const fs::path kConfigs = fs::path(LIGHTER_SOURCE_DIR) / "configs";

std::string slurp(const fs::path& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

// YAML's core types, for the checks of the schema.
json to_json(const YAML::Node& node) {
  if (node.IsMap()) {
    json object = json::object();
    for (const auto& entry : node) object[entry.first.Scalar()] = to_json(entry.second);
    return object;
  }
  if (node.IsSequence()) {
    json list = json::array();
    for (const auto& item : node) list.push_back(to_json(item));
    return list;
  }
  if (node.IsNull()) return nullptr;
  static const std::regex number(R"([-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|true|false)");
  const std::string& text = node.Scalar();
  if (node.Tag() == "!" || !std::regex_match(text, number)) return text;
  return json::parse(text);
}

// As much of JSON Schema as config_schema() uses.
bool validates(const json& schema, const json& value) {
  const auto has_type = [&](const json& type) {
    return type == "object"    ? value.is_object()
           : type == "null"    ? value.is_null()
           : type == "array"   ? value.is_array()
           : type == "string"  ? value.is_string()
           : type == "boolean" ? value.is_boolean()
           : type == "integer" ? value.is_number_integer()
                               : value.is_number();
  };
  const json object = value.is_object() ? value : json::object();
  const json array = value.is_array() ? value : json::array();
  for (const auto& [word, rule] : schema.items()) {
    bool good = true;
    const auto holds = [&](const json& part) { return validates(part, value); };
    if (word == "type") {
      good = rule.is_array() ? std::ranges::any_of(rule, has_type) : has_type(rule);
    } else if (word == "enum") {
      good = std::ranges::find(rule, value) != rule.end();
    } else if (word == "anyOf") {
      good = std::ranges::any_of(rule, holds);
    } else if (word == "oneOf") {
      good = std::ranges::count_if(rule, holds) == 1;
    } else if (word == "minimum") {
      good = !value.is_number() || value >= rule;
    } else if (word == "exclusiveMinimum") {
      good = !value.is_number() || value > rule;
    } else if (word == "maximum") {
      good = !value.is_number() || value <= rule;
    } else if (word == "minLength") {
      good = !value.is_string() || value.get<std::string>().size() >= rule.get<size_t>();
    } else if (word == "pattern") {
      good = !value.is_string() ||
             std::regex_search(value.get<std::string>(), std::regex(rule.get<std::string>()));
    } else if (word == "required") {
      good =
          !value.is_object() || std::ranges::all_of(rule, [&](const json& k) { return value.contains(k); });
    } else if (word == "items") {
      for (const json& item : array) good = good && validates(rule, item);
    } else if (word == "properties") {
      for (const auto& [key, part] : object.items()) {
        good = good && (!rule.contains(key) || validates(rule[key], part));
      }
    } else if (word == "additionalProperties") {
      const json named = schema.value("properties", json::object());
      const json patterns = schema.value("patternProperties", json::object());
      for (const auto& [key, part] : object.items()) {
        bool known = named.contains(key);
        for (const auto& [pattern, unused] : patterns.items()) {
          known = known || std::regex_search(key, std::regex(pattern));
        }
        good = good && known;
      }
    } else if (word == "patternProperties") {
      for (const auto& [pattern, item] : rule.items()) {
        for (const auto& [key, part] : object.items()) {
          good = good && (!std::regex_search(key, std::regex(pattern)) || validates(item, part));
        }
      }
    } else if (word == "minProperties") {
      good = !value.is_object() || value.size() >= rule.get<size_t>();
    } else {
      const std::set<std::string> notes{"$schema", "title", "description", "default"};
      REQUIRE_MESSAGE(notes.contains(word), "the test's validator does not know " << word);
    }
    if (!good) return false;
  }
  return true;
}

}  // namespace

TEST_CASE("the shipped schema is the parser's own") {
  const std::string wanted = config_schema().dump(2) + "\n";
  const bool equal = slurp(kConfigs / "lighter.schema.json") == wanted;
  if (!equal) std::ofstream("lighter.schema.json") << wanted;
  CHECK_MESSAGE(equal, "copy lighter.schema.json from ", fs::current_path(), " to ", kConfigs);
}

TEST_CASE("every shipped configuration loads, fits the schema and names it in its first line") {
  int count = 0;
  for (const auto& entry : fs::directory_iterator(kConfigs)) {
    if (entry.path().extension() != ".yaml") continue;
    if (entry.path().filename().string().starts_with("bench-")) continue;  // a sweep, with keys of its own
    CAPTURE(entry.path());
    CHECK_NOTHROW(load_config(entry.path()));
    CHECK(validates(config_schema(), to_json(YAML::LoadFile(entry.path().string()))));
    CHECK(slurp(entry.path()).starts_with("# yaml-language-server: $schema=lighter.schema.json\n# "));
    ++count;
  }
  CHECK(count >= 6);
}

TEST_CASE("schema and parser accept and refuse the same values") {
  // Only the parser knows that 0GiB is no size and that the exponent of zipf:11 is too large.
  const std::vector<std::string> values{
      "",      "0",         "1",         "8",     "9",        "256",     "0.5",     "1.5",          "-1",
      "1e-3",  "true",      "'1'",       "auto",  "lru",      "fp32",    "x.json",  "llama-3.1-8b", "cuda:1",
      "cuda:", "78GiB",     "7.5 MB",    "7 PiB", "zipf:1.5", "uniform", "'1-2/*'", "[]",           "[0, 1]",
      "[2]",   "['1,2/3']", "['2/1-x']", "[a]",   "[true]",   "{}",      "{a: 1}",
      "int4",  "{'*': int8}", "{'0-3,7': int8, 4: dtype}", "{'*': auto}", "{'3-x': int8}"};
  const json schema = config_schema();
  for (const ConfigKey& key : config_keys()) {
    for (const std::string& value : values) {
      std::string base = kSynthetic;  // in which every key is allowed
      if (key.path == "model.path") base.erase(0, base.find('\n') + 1);
      YAML::Node root = YAML::Load(base), node = root;
      std::string name = key.path;
      for (size_t dot; (dot = name.find('.')) != name.npos; name.erase(0, dot + 1)) {
        node.reset(node[name.substr(0, dot)]);
      }
      node[name] = YAML::Load(value);
      CAPTURE(key.path);
      CAPTURE(value);
      CHECK(validates(schema, to_json(root)) == error_of(base, {key.path + "=" + value}).empty());
    }
  }
}

TEST_CASE("every default in the schema is the value of the struct") {
  for (const ConfigKey& key : config_keys()) {
    if (key.fallback.is_null()) continue;
    CAPTURE(key.path);
    CHECK(error_of(kSynthetic, {key.path + "=" + key.fallback.dump()}).empty());
  }
  Config assigned;
  for (const ConfigKey& key : config_keys()) {
    if (!key.fallback.is_null()) key.assign(assigned, key.fallback);
  }
  const Config fresh;
  CHECK(assigned.model.dtype == fresh.model.dtype);
  CHECK(assigned.model.seed == fresh.model.seed);
  CHECK(assigned.device.kind == fresh.device.kind);
  CHECK(assigned.device.index == fresh.device.index);
  CHECK(assigned.memory.context == fresh.memory.context);
  CHECK(assigned.memory.prefill_chunk == fresh.memory.prefill_chunk);
  CHECK(assigned.memory.kv_block == fresh.memory.kv_block);
  CHECK(assigned.offload.resident.index() == fresh.offload.resident.index());
  CHECK(assigned.offload.policy == fresh.offload.policy);
  CHECK(assigned.offload.pin.size() == fresh.offload.pin.size());
  CHECK(assigned.offload.prefetch.enabled == fresh.offload.prefetch.enabled);
  CHECK(assigned.offload.prefetch.depth == fresh.offload.prefetch.depth);
  CHECK(assigned.offload.slice_width == fresh.offload.slice_width);
  CHECK(assigned.offload.near_pages == fresh.offload.near_pages);
  CHECK(assigned.offload.routing.schedule == fresh.offload.routing.schedule);
  CHECK(assigned.offload.routing.seed == fresh.offload.routing.seed);
  CHECK(assigned.cpu.threads == fresh.cpu.threads);
  CHECK(assigned.generate.max_tokens == fresh.generate.max_tokens);
  CHECK(assigned.generate.temperature == fresh.generate.temperature);
  CHECK(assigned.generate.stop == fresh.generate.stop);
  CHECK(assigned.generate.ignore_eos == fresh.generate.ignore_eos);
}
