#include "bench/yaml_map.h"

#include <algorithm>
#include <limits>

#include "runtime/config/edit_distance.h"

namespace lighter::bench {
namespace {

const MapKey& nearest(const std::string& name, std::span<const MapKey> keys) {
  return *std::ranges::min_element(keys, {}, [&](const MapKey& key) {
    return edit_distance(std::string_view(name).substr(0, 200), key.name);
  });
}

}  // namespace

YamlMap::YamlMap(const YamlSource& source, const std::string& path, const YAML::Node& node,
                 std::span<const MapKey> keys)
    : where_(source.at(node.Mark())) {
  const std::string called = path.empty() ? "the file" : "'" + path + "'";
  if (!node.IsMap()) fail_at(where_, called + " must be a map of keys, but is " + describe_value(node));
  const std::string prefix = path.empty() ? "" : path + ".";
  std::vector<std::string> seen;
  for (const auto& entry : node) {
    const std::string here = source.at(entry.first.Mark());
    if (!entry.first.IsScalar()) {
      fail_at(here, "a key must be a name, but is " + describe_value(entry.first));
    }
    const std::string& name = entry.first.Scalar();
    const auto key = std::ranges::find(keys, name, &MapKey::name);
    if (key == keys.end()) {
      const std::string& guess = nearest(name, keys).name;
      const bool plausible = edit_distance(name.substr(0, 200), guess) <= 1 + name.size() / 3;
      fail_at(here, "unknown key '" + shorten(prefix + name) + "'; " +
                        (plausible ? "did you mean '" + prefix + guess + "'?"
                                   : "the nearest known key is '" + prefix + guess + "'"));
    }
    if (std::ranges::find(seen, name) != seen.end()) fail_at(here, "duplicate key '" + prefix + name + "'");
    seen.push_back(name);
    if (entry.second.IsNull()) continue;
    nlohmann::json value;
    if (key->or_list && entry.second.IsSequence()) {
      value = nlohmann::json::array();
      for (const auto& item : entry.second) {
        const std::string called = prefix + name + "[" + std::to_string(value.size()) + "]";
        value.push_back(match_value(source, called, key->forms, item));
      }
    } else if (!key->forms.empty()) {
      value = match_value(source, prefix + name, key->forms, entry.second);
    }
    entries_[name] = {entry.second, std::move(value), source.at(entry.second.Mark())};
  }
  for (const MapKey& key : keys) {
    if (key.required && !entries_.contains(key.name)) {
      fail_at(where_, "'" + prefix + key.name + "' is missing" +
                          (key.forms.empty() ? "" : "; it must be " + describe_forms(key.forms)));
    }
  }
}

const MapEntry* YamlMap::find(const std::string& name) const {
  const auto found = entries_.find(name);
  return found == entries_.end() ? nullptr : &found->second;
}

}  // namespace lighter::bench
