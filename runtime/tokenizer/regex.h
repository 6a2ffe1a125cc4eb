// A compiled regular expression. Immutable and thread-safe; move-only. Owns the compiled code.
#pragma once

#include <cstddef>
#include <memory>
#include <string_view>
#include <vector>

struct pcre2_real_code_8;

namespace lighter::tokenizer {

// A part of a text in bytes, and whether a pattern matched it.
struct Span {
  std::size_t begin;
  std::size_t end;
  bool is_match;
};

class Regex {
 public:
  // pattern in Oniguruma's dialect. Throws UnsupportedRegex.
  explicit Regex(std::string_view pattern);

  // Cuts text (valid UTF-8) into matches and what lies between them, left to right, covering all of it. An
  // empty match is reported unless it touches the end of the match before. Throws Error if the engine gives
  // up.
  std::vector<Span> cut(std::string_view text) const;

  bool matches_anywhere(std::string_view text) const;

 private:
  struct Deleter {
    void operator()(pcre2_real_code_8* code) const;
  };
  std::unique_ptr<pcre2_real_code_8, Deleter> code_;
};

}  // namespace lighter::tokenizer
