// The one table of YAML keys. The parser, its "did you mean" and the JSON Schema are all made from it, so
// they cannot disagree. Pure values; thread-safe once config_keys() has returned.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/config/config.h"
#include "runtime/config/value_form.h"

namespace lighter {

struct ConfigKey {
  std::string path;  // "offload.policy"
  std::string description;
  std::vector<ValueForm> forms;  // any of these
  nlohmann::json fallback;       // the default as it would be written, null if there is none
  bool required = false;
  // Takes a value that one of the forms accepts.
  void (*assign)(Config&, const nlohmann::json&) = nullptr;
};

// A map of keys or of further sections; the file itself is the section "".
struct ConfigSection {
  std::string path;
  std::string description;
};

const std::vector<ConfigKey>& config_keys();
const std::vector<ConfigSection>& config_sections();

const ConfigKey* find_key(std::string_view path);
const ConfigSection* find_section(std::string_view path);

// The known key or section nearest to an unknown one, by edit distance of the whole path or, for a key in the
// wrong section, of its last part. plausible: near enough to be a typing error.
struct NearestKey {
  std::string path;
  bool plausible = false;
};
NearestKey nearest_key(std::string_view unknown);

}  // namespace lighter
