#include "runtime/config/value_form.h"

#include <array>
#include <cstdio>
#include <utility>

namespace lighter {
namespace {

using Kind = ValueForm::Kind;

std::string format_number(double value) {
  std::array<char, 32> buffer{};
  std::snprintf(buffer.data(), buffer.size(), "%g", value);
  return buffer.data();
}

}  // namespace

namespace forms {

ValueForm boolean() {
  return {.kind = Kind::boolean};
}

ValueForm integer(uint64_t min, uint64_t max) {
  return {.kind = Kind::integer, .min_integer = min, .max_integer = max};
}

ValueForm one_of_integers(std::vector<uint64_t> values) {
  return {.kind = Kind::integer, .integers = std::move(values)};
}

ValueForm number(double min, double max) {
  return {.kind = Kind::number, .min_number = min, .max_number = max};
}

ValueForm number_above(double min, double max) {
  return {.kind = Kind::number, .min_number = min, .max_number = max, .above_min = true};
}

ValueForm words(std::vector<std::string> choices) {
  return {.kind = Kind::word, .words = std::move(choices)};
}

ValueForm text(std::string what, std::string pattern, bool (*accepts)(std::string_view)) {
  return {.kind = Kind::text, .pattern = std::move(pattern), .accepts = accepts, .what = std::move(what)};
}

ValueForm list_of(ValueForm item) {
  return {.kind = Kind::list, .item = {std::move(item)}};
}

ValueForm map_of(std::string keys, std::string pattern, bool (*accepts)(std::string_view),
                 std::string (*conflict)(std::string_view, std::string_view), ValueForm item) {
  return {.kind = Kind::map,
          .pattern = std::move(pattern),
          .accepts = accepts,
          .what = std::move(keys),
          .item = {std::move(item)},
          .conflict = conflict};
}

}  // namespace forms

std::string ValueForm::describe() const {
  std::string choices;
  switch (kind) {
    case Kind::boolean:
      return "true or false";
    case Kind::integer:
      if (integers.empty()) {
        return "a whole number from " + std::to_string(min_integer) + " to " + std::to_string(max_integer);
      }
      for (uint64_t value : integers) choices += (choices.empty() ? "" : ", ") + std::to_string(value);
      return "one of " + choices;
    case Kind::number:
      return above_min
                 ? "a number above " + format_number(min_number) + " and at most " + format_number(max_number)
                 : "a number from " + format_number(min_number) + " to " + format_number(max_number);
    case Kind::word:
      if (words.size() == 1) return words.front();
      for (const std::string& word : words) choices += (choices.empty() ? "" : ", ") + word;
      return "one of " + choices;
    case Kind::text:
      return what;
    case Kind::list:
      return "a list, each item " + item.front().describe();
    case Kind::map:
      return "a map from " + what + " to " + item.front().describe();
  }
  return "";
}

}  // namespace lighter
