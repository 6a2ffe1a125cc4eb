// Oniguruma patterns (the dialect of tokenizer.json) rewritten for PCRE2. Stateless.
//
// Only constructs that match the same text in both engines are let through; what differs is either spelled
// out
// (\s, \S, \d, \D, \v, \uHHHH, \p{…}, for which PCRE2's older Unicode tables are completed) or refused (\w,
// \b, \h, ^, $, nested and intersected classes, {n}+, inline flags but (?i), scripts, …). Refusing is loud
// and fixable; a piece boundary that moves changes the ids without a word.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace lighter::tokenizer {

// A pattern that cannot be taken over; the message says which part of it.
class UnsupportedRegex : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// pattern: valid UTF-8. The result is meant for PCRE2_UTF | PCRE2_UCP. Throws UnsupportedRegex.
std::string to_pcre2(std::string_view pattern);

}  // namespace lighter::tokenizer
