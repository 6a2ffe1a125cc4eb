// What happens to text before it is cut into pieces: prefixes and replacements, in the order of
// tokenizer.json. Immutable, so thread-safe. NFC and its relatives are not supported; the loader says so.
#pragma once

#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "runtime/tokenizer/regex.h"

namespace lighter::tokenizer {

// A plain string, matched as it is, or a regular expression.
using Pattern = std::variant<std::string, Regex>;

// Regex::cut for either kind. A plain pattern must not be empty.
std::vector<Span> cut(std::string_view text, const Pattern& pattern);

std::string replace_all(std::string_view text, const Pattern& pattern, std::string_view content);

class Normalizer {
 public:
  // Puts prefix before every text that is not empty.
  void add_prepend(std::string prefix) { steps_.push_back({Prepend{std::move(prefix)}}); }
  // Replaces every match of pattern with content, which is taken literally.
  void add_replace(Pattern pattern, std::string content) {
    steps_.push_back({Replace{std::move(pattern), std::move(content)}});
  }

  std::string apply(std::string_view text) const;

 private:
  struct Prepend {
    std::string prefix;
  };
  struct Replace {
    Pattern pattern;
    std::string content;
  };
  std::vector<std::variant<Prepend, Replace>> steps_;
};

}  // namespace lighter::tokenizer
