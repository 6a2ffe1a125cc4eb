// UTF-8 by hand: validation, lossy repair and white space. Stateless.
//
// Text that is not valid UTF-8 is repaired, never refused: each maximal invalid part becomes one U+FFFD, as
// the WHATWG decoder and Rust's from_utf8_lossy do, so a damaged prompt encodes like the same bytes read by
// the reference tokenizer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace lighter::tokenizer {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";

enum class Utf8Status {
  valid,       // a whole character
  invalid,     // bytes that no continuation can repair
  incomplete,  // the text ends inside a character that may still become valid
};

// What stands at one position: its status, its bytes (>= 1), and the code point if valid.
struct Utf8Char {
  Utf8Status status;
  std::size_t length;
  char32_t code_point;
};

// text must not be empty; reads its first character.
Utf8Char first_char(std::string_view text);

bool is_valid_utf8(std::string_view text);

std::string to_valid_utf8(std::string_view text);

void append_utf8(std::string& out, char32_t code_point);

// The 25 characters of Unicode's White_Space, which Oniguruma's and Rust's \s match (PCRE2's \s also matches
// U+180E).
bool is_white_space(char32_t code_point);

// Where the white space that ends at the end of text begins, and where that at its start ends (bytes; text
// must be valid UTF-8).
std::size_t trailing_space_begin(std::string_view text);
std::size_t leading_space_end(std::string_view text);

}  // namespace lighter::tokenizer
