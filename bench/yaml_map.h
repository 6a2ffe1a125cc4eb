// One map of a sweep file, read against the list of keys that it may have. Not thread-safe.
#pragma once

#include <map>
#include <span>
#include <string>
#include <vector>

#include "runtime/config/value_form.h"
#include "runtime/config/yaml_values.h"

namespace lighter::bench {

// A key whose forms are empty holds something of its own (a map, a list of maps), which the caller reads.
// or_list: a list of such values counts too.
struct MapKey {
  std::string name;
  std::vector<ValueForm> forms;
  bool required = false;
  bool or_list = false;
};

struct MapEntry {
  YAML::Node node;
  nlohmann::json value;  // null for a key without forms
  std::string where;     // of the value
};

class YamlMap {
 public:
  // path: for messages, "points[2]"; "" for the file. Throws ConfigError for what is no map, for an unknown
  // or repeated key (with the nearest known one), for a value that no form accepts, and for a missing key.
  YamlMap(const YamlSource& source, const std::string& path, const YAML::Node& node,
          std::span<const MapKey> keys);

  const MapEntry* find(const std::string& name) const;
  const MapEntry& at(const std::string& name) const { return entries_.at(name); }
  template <typename T>
  T get(const std::string& name, T fallback) const {
    const MapEntry* entry = find(name);
    return entry == nullptr ? fallback : entry->value.get<T>();
  }
  const std::string& where() const { return where_; }

 private:
  std::string where_;
  std::map<std::string, MapEntry> entries_;  // a null value counts as not there
};

}  // namespace lighter::bench
