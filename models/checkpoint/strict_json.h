// JSON as checkpoints hold it, read with suspicion: the text may be damaged or hostile. Stateless.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace lighter::models {

// Parses text; CheckpointError, which begins with `what`, if it is not valid JSON, nests deeper than
// max_depth (an object in the outermost object has depth 1), or repeats a key within one object.
nlohmann::json parse_strict_json(std::string_view text, const std::string& what, int max_depth);

// The name in double quotes, control characters escaped and overlong names cut, for use in messages.
std::string quote_name(std::string_view name);

}  // namespace lighter::models
