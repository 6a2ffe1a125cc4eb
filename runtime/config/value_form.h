// What a YAML key accepts: the parser matches it, messages describe it and the JSON Schema shows it.
// Pure values; thread-safe.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace lighter {

// One kind of value that a key accepts.
struct ValueForm {
  enum class Kind { boolean, integer, number, word, text, list, map };
  Kind kind = Kind::boolean;
  uint64_t min_integer = 0, max_integer = 0;    // integer: both included
  std::vector<uint64_t> integers{};             // integer: if not empty, only these
  double min_number = 0, max_number = 0;        // number: both included, but
  bool above_min = false;                       //   the minimum only if this is false
  std::vector<std::string> words{};             // word: the only ones
  std::string pattern{};                        // text: regular expression (ECMAScript), empty = any but ""
  bool (*accepts)(std::string_view) = nullptr;  // text: what the pattern cannot say; may be null
  std::string what{};                           // text: in words, "a size such as 78GiB"; map: of its keys
  std::vector<ValueForm> item{};                // list, map: exactly one
  // map: its keys match `pattern` and are not none; what is wrong with two keys beside each other, or "".
  std::string (*conflict)(std::string_view key, std::string_view other) = nullptr;

  // For messages: "a whole number from 1 to 8".
  std::string describe() const;
};

namespace forms {

ValueForm boolean();
ValueForm integer(uint64_t min, uint64_t max);
ValueForm one_of_integers(std::vector<uint64_t> values);
ValueForm number(double min, double max);
ValueForm number_above(double min, double max);
ValueForm words(std::vector<std::string> choices);
// what: in words, for messages; see pattern and accepts above.
ValueForm text(std::string what, std::string pattern = "", bool (*accepts)(std::string_view) = nullptr);
ValueForm list_of(ValueForm item);
// keys: in words, for messages.
ValueForm map_of(std::string keys, std::string pattern, bool (*accepts)(std::string_view),
                 std::string (*conflict)(std::string_view, std::string_view), ValueForm item);

}  // namespace forms

}  // namespace lighter
