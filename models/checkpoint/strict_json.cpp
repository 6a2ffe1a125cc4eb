#include "models/checkpoint/strict_json.h"

#include <unordered_set>
#include <vector>

#include "runtime/error.h"

namespace lighter::models {

nlohmann::json parse_strict_json(std::string_view text, const std::string& what, int max_depth) {
  using nlohmann::json;
  // keys[d]: the keys seen so far in the object that is open at depth d.
  std::vector<std::unordered_set<std::string>> keys(static_cast<std::size_t>(max_depth) + 1);
  const auto check = [&](int depth, json::parse_event_t event, json& parsed) {
    if (event == json::parse_event_t::object_start || event == json::parse_event_t::array_start) {
      if (depth > max_depth) throw CheckpointError(what + ": nested too deeply");
      keys[static_cast<std::size_t>(depth)].clear();
    } else if (event == json::parse_event_t::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      // The parser counts a key as one deeper than the object that holds it.
      if (!keys[static_cast<std::size_t>(depth) - 1].insert(key).second) {
        throw CheckpointError(what + ": " + quote_name(key) + " appears twice");
      }
    }
    return true;
  };
  try {
    return json::parse(text.begin(), text.end(), check);
  } catch (const json::parse_error& error) {
    // The library's own message may quote megabytes of the text.
    throw CheckpointError(what + ": not valid JSON (at byte " + std::to_string(error.byte) + " of " +
                          std::to_string(text.size()) + ")");
  } catch (const json::out_of_range&) {
    throw CheckpointError(what + ": a number is too large");
  }
}

std::string quote_name(std::string_view name) {
  constexpr std::size_t longest = 200;
  std::string shown(name.substr(0, longest));
  if (name.size() > longest) shown += "...";
  return nlohmann::json(shown).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace lighter::models
