// Reading a configuration: YAML nodes → values that the table of keys accepts → Config.
// Values are gathered first and assigned at the end, so that a later null can take an earlier one back and
// rules across keys can still say where each value came from.
#include "runtime/config/config.h"

#include <algorithm>
#include <map>

#include "runtime/config/config_keys.h"
#include "runtime/config/yaml_values.h"

namespace lighter {
namespace {

using nlohmann::json;

struct Setting {
  json value;
  std::string where;
  bool from_override = false;
};

class Reader {
 public:
  // path: a key, a section, or "" for the whole file; where: of the name, if it has one.
  void read(const YamlSource& source, const std::string& path, const std::string& where,
            const YAML::Node& node) {
    if (find_section(path)) {
      read_section(source, path, where, node);
    } else if (const ConfigKey* key = find_key(path)) {
      read_key(source, *key, node);
    } else {
      const NearestKey nearest = nearest_key(path);
      fail_at(where, "unknown key '" + shorten(path) + "'; " +
                         (nearest.plausible ? "did you mean '" + nearest.path + "'?"
                                            : "the nearest known key is '" + nearest.path + "'"));
    }
  }

  Config finish(const std::filesystem::path& file) const;

 private:
  void read_section(const YamlSource& source, const std::string& path, const std::string& where,
                    const YAML::Node& node) {
    section_where_[path] = where;
    const std::string prefix = path.empty() ? "" : path + ".";
    if (node.IsNull()) {
      std::erase_if(settings_, [&](const auto& entry) { return entry.first.starts_with(prefix); });
      return;
    }
    if (!node.IsMap()) {
      fail_at(source.at(node.Mark()), (path.empty() ? "the file" : "'" + path + "'") +
                                          " must be a map of keys, but is " + describe_value(node));
    }
    std::map<std::string, int> lines;
    for (const auto& entry : node) {
      const YAML::Node& name = entry.first;
      const std::string here = source.at(name.Mark());
      if (!name.IsScalar()) fail_at(here, "a key must be a name, but is " + describe_value(name));
      const std::string child = prefix + name.Scalar();
      const auto [first, is_new] = lines.emplace(name.Scalar(), name.Mark().line + 1);
      if (!is_new) {
        fail_at(here,
                "duplicate key '" + child + "'" +
                    (source.is_override ? "" : "; it is already on line " + std::to_string(first->second)));
      }
      read(source, child, here, entry.second);
    }
  }

  void read_key(const YamlSource& source, const ConfigKey& key, const YAML::Node& node) {
    const std::string where = source.at(node.Mark());
    if (node.IsNull()) {
      settings_.erase(key.path);
      return;
    }
    settings_[key.path] = {match_value(source, key.path, key.forms, node), where, source.is_override};
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
    fail_at(section_of("model.path"),
            "no model: set 'model.path' to a checkpoint folder, or 'model.synthetic'");
  }
  if (path && synthetic) {
    const Setting* later = path->from_override && !synthetic->from_override ? path : synthetic;
    fail_at(later->where, "'model.path' and 'model.synthetic' are both set; keep one" +
                              std::string(later->from_override ? " (\"--set key=\" clears the other)" : ""));
  }
  for (const ConfigKey& key : config_keys()) {
    if (key.required && !find(key.path)) {
      fail_at(section_of(key.path), "'" + key.path + "' is missing; it must be " + describe_forms(key.forms));
    }
  }
  if (synthetic) return;
  const std::string advice = "; remove it, or use 'model.synthetic' instead of 'model.path'";
  for (const char* name : {"model.layers", "model.seed"}) {
    if (const Setting* setting = find(name)) {
      fail_at(setting->where, "'" + std::string(name) + "' is only for synthetic weights" + advice);
    }
  }
  const Setting* schedule = find("offload.routing.schedule");
  if (schedule && schedule->value != "router") {
    fail_at(schedule->where, "'offload.routing.schedule' must be router for a checkpoint, but is '" +
                                 schedule->value.get<std::string>() + "'" + advice);
  }
}

Config Reader::finish(const std::filesystem::path& file) const {
  check_rules();
  Config config;
  for (const ConfigKey& key : config_keys()) {
    if (const Setting* setting = find(key.path)) key.assign(config, setting->value);
  }
  for (const char* format : {"format", "experts", "shared", "attention", "head"}) {
    if (find("model." + std::string(format))) config.model.formats_given = true;
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

}  // namespace

Config load_config(const std::filesystem::path& file, std::span<const std::string> overrides) {
  Reader reader;
  const YamlSource source{file.string()};
  const YAML::Node root = parse_yaml(source, read_text(file));
  reader.read(source, "", source.at(YAML::Mark::null_mark()), root);
  for (const std::string& text : overrides) {
    const YamlSource override_source{"--set " + text, true};
    const size_t equals = text.find('=');
    if (equals == text.npos || equals == 0) fail_at(override_source.name, "write it as key.path=value");
    reader.read(override_source, text.substr(0, equals), override_source.name,
                parse_yaml(override_source, text.substr(equals + 1)));
  }
  return reader.finish(file);
}

}  // namespace lighter
