#include "runtime/tokenizer/regex_dialect.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <vector>

#include "runtime/tokenizer/unicode_additions.h"

namespace lighter::tokenizer {
namespace {

// The inside of a character class that matches \s as Oniguruma does, and its complement.
constexpr std::string_view kSpace =
    R"(\x09-\x0d\x20\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
constexpr std::string_view kNotSpace =
    R"(\x00-\x08\x0e-\x1f\x21-\x{84}\x{86}-\x{9f}\x{a1}-\x{167f}\x{1681}-\x{1fff}\x{200b}-\x{2027})"
    R"(\x{202a}-\x{202e}\x{2030}-\x{205e}\x{2060}-\x{2fff}\x{3001}-\x{10ffff})";

// C, Cn, Cs and Mn are left out: they lost members from one Unicode version to the next, so that adding what
// came later does not make them equal.
constexpr std::array<std::string_view, 33> kCategories = {
    "L",  "Lu", "Ll", "Lt", "Lm", "Lo", "M",  "Mc", "Me", "N", "Nd", "Nl", "No", "P",  "Pc", "Pd", "Ps",
    "Pe", "Pi", "Pf", "Po", "S",  "Sm", "Sc", "Sk", "So", "Z", "Zs", "Zl", "Zp", "Cc", "Cf", "Co"};

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}
bool is_letter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}
bool is_hex(char c) {
  return is_digit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F');
}

// The inside of a character class that matches a general category in Unicode 16.
std::string category_class(std::string_view name) {
  std::string out = "\\p{" + std::string(name) + "}";
  for (const CategoryRange& range : kUnicodeAdditions) {
    if (std::string_view(range.category).substr(0, name.size()) != name) continue;
    std::array<char, 32> text;
    std::snprintf(text.data(), text.size(), "\\x{%x}-\\x{%x}", static_cast<unsigned>(range.first),
                  static_cast<unsigned>(range.last));
    out += text.data();
  }
  return out;
}

class Rewriter {
 public:
  explicit Rewriter(std::string_view pattern) : pattern_(pattern) {}

  std::string run() {
    if (pattern_.substr(0, 4) == "(?i)") {
      caseless_.back() = true;
      copy(4);
    }
    while (at_ < pattern_.size()) outside_class();
    return std::move(out_);
  }

 private:
  [[noreturn]] void refuse(std::size_t begin, std::size_t length, const std::string& why) const {
    throw UnsupportedRegex("the regular expression \"" + std::string(pattern_) + "\" uses \"" +
                           std::string(pattern_.substr(begin, length)) + "\" at byte " +
                           std::to_string(begin) + ", which is not supported: " + why);
  }
  char peek(std::size_t ahead = 0) const {
    return at_ + ahead < pattern_.size() ? pattern_[at_ + ahead] : '\0';
  }
  void copy(std::size_t bytes) {
    out_ += pattern_.substr(at_, bytes);
    at_ += bytes;
  }

  void outside_class() {
    const char c = peek();
    const char previous = previous_literal_;
    previous_literal_ = '\0';
    switch (c) {
      case '\\':
        return escape(false);
      case '[':
        return character_class();
      case '(':
        return open_group();
      case ')':
        if (caseless_.size() > 1) caseless_.pop_back();
        return copy(1);
      case '{':
        return repeat();
      case '^':
      case '$':
        refuse(at_, 1, "anchors differ between regex engines");
      case '|':
      case '.':
      case '?':
      case '*':
      case '+':
        return copy(1);
      default:
        check_caseless(previous, c);
        return copy(1);
    }
  }

  // Oniguruma folds some letter pairs into one character without case ("ss" matches "ß"); PCRE2 does not.
  void check_caseless(char previous, char c) {
    if (!caseless_.back()) return;
    const char lower = is_letter(c) ? static_cast<char>(c | 0x20) : c;
    if (static_cast<unsigned char>(c) >= 0x80) {
      refuse(at_, 1, "a non-ASCII letter without case folds differently between regex engines");
    }
    constexpr std::array<std::string_view, 5> folded = {"ss", "st", "ff", "fi", "fl"};
    const std::string pair = {previous, lower};
    if (std::find(folded.begin(), folded.end(), pair) != folded.end()) {
      refuse(at_ - 1, 2, "without case it folds differently between regex engines");
    }
    previous_literal_ = lower;
  }

  void open_group() {
    if (peek(1) == '*') refuse(at_, 2, "not a group");
    bool caseless = caseless_.back();
    std::size_t length = 1;
    if (peek(1) == '?') {
      constexpr std::array<std::string_view, 7> known = {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:"};
      const auto found = std::find_if(known.begin(), known.end(), [&](std::string_view opening) {
        return pattern_.substr(at_, opening.size()) == opening;
      });
      if (found == known.end()) refuse(at_, 4, "only (?: (?= (?! (?<= (?<! (?> and (?i: are known");
      length = found->size();
      caseless = caseless || *found == "(?i:";
    }
    caseless_.push_back(caseless);
    copy(length);
  }

  void repeat() {
    std::size_t end = at_ + 1;
    while (end < pattern_.size() && is_digit(pattern_[end])) ++end;
    const bool has_minimum = end > at_ + 1;
    if (end < pattern_.size() && pattern_[end] == ',') ++end;
    while (end < pattern_.size() && is_digit(pattern_[end])) ++end;
    if (!has_minimum || end == pattern_.size() || pattern_[end] != '}') {
      refuse(at_, end - at_ + 1, "a repeat must read {n}, {n,} or {n,m}");
    }
    copy(end + 1 - at_);
    if (peek() == '+' || peek() == '?') refuse(at_, 1, "after {…} it differs between regex engines");
  }

  void character_class() {
    const std::size_t begin = at_;
    copy(peek(1) == '^' ? 2 : 1);
    if (peek() == ']') refuse(begin, at_ - begin + 1, "an empty class");
    const std::size_t first = at_;
    bool after_dash = false;
    while (peek() != ']') {
      if (at_ >= pattern_.size()) refuse(begin, pattern_.size() - begin, "the class does not end");
      if (peek() == '[') refuse(at_, 2, "classes inside classes");
      if (peek() == '&' && peek(1) == '&') refuse(at_, 2, "intersections of classes");
      if (peek() == '\\') {
        const bool is_set = std::string_view("sSdDpP").find(peek(1)) != std::string_view::npos;
        if (is_set && after_dash) refuse(at_, 2, "the end of a range cannot be a set");
        escape(true);
        if (is_set && peek() == '-' && peek(1) != ']') refuse(at_, 1, "a range cannot start with a set");
        after_dash = false;
        continue;
      }
      after_dash = peek() == '-' && at_ > first;
      if (caseless_.back() && static_cast<unsigned char>(peek()) >= 0x80) check_caseless('\0', peek());
      copy(1);
    }
    copy(1);
  }

  void put_set(bool in_class, bool negated, const std::string& inside) {
    if (in_class && negated) refuse(at_, 2, "a negated set inside a class");
    out_ += in_class ? inside : (negated ? "[^" : "[") + inside + "]";
  }

  void escape(bool in_class) {
    const char c = peek(1);
    switch (c) {
      case 's':
        put_set(in_class, false, std::string(kSpace));
        break;
      case 'S':
        put_set(in_class, false, std::string(kNotSpace));
        break;
      case 'd':
      case 'D':
        put_set(in_class, c == 'D', category_class("Nd"));
        break;
      case 'p':
      case 'P':
        return property(in_class);
      case 'x':
      case 'u':
        return code_point();
      case 'v':  // the vertical tab; in PCRE2 a set
        out_ += "\\x0b";
        break;
      case 'n':
      case 'r':
      case 't':
      case 'f':
        return copy(2);
      default:
        if (is_letter(c) || is_digit(c) || c == '\0' || static_cast<unsigned char>(c) >= 0x80) {
          refuse(at_, 2, "this escape is unknown or differs between regex engines");
        }
        return copy(2);
    }
    at_ += 2;
  }

  void property(bool in_class) {
    const std::size_t end = pattern_.find('}', at_);
    if (peek(2) != '{' || end == std::string_view::npos) refuse(at_, 2, "a property must read \\p{Name}");
    const std::string_view name = pattern_.substr(at_ + 3, end - at_ - 3);
    const std::size_t length = end + 1 - at_;
    if (std::find(kCategories.begin(), kCategories.end(), name) == kCategories.end()) {
      refuse(at_, length, "only general categories such as \\p{L} or \\p{Lu} are known");
    }
    if (caseless_.back() && (name == "Lu" || name == "Ll" || name == "Lt")) {
      refuse(at_, length, "a letter case where case is ignored");
    }
    put_set(in_class, peek(1) == 'P', category_class(name));
    at_ += length;
  }

  // \xHH, \x{H…} and \uHHHH.
  void code_point() {
    const bool braces = peek(1) == 'x' && peek(2) == '{';
    const std::size_t begin = at_ + (braces ? 3 : 2);
    const std::size_t most = braces ? 6 : (peek(1) == 'x' ? 2 : 4);
    std::size_t end = begin;
    while (end < pattern_.size() && end - begin < most && is_hex(pattern_[end])) ++end;
    const std::string digits(pattern_.substr(begin, end - begin));
    const bool complete =
        braces ? end < pattern_.size() && pattern_[end] == '}' && !digits.empty() : digits.size() == most;
    // \x80 and above is a byte to Oniguruma but a character to PCRE2.
    if (!complete || (!braces && most == 2 && digits[0] >= '8')) {
      refuse(at_, end + 1 - at_, "a character must read \\xHH (up to 7F), \\x{H…} or \\uHHHH");
    }
    out_ += "\\x{" + digits + "}";
    at_ = end + (braces ? 1 : 0);
  }

  std::string_view pattern_;
  std::size_t at_ = 0;
  std::string out_;
  std::vector<bool> caseless_ = {false};  // per open group
  char previous_literal_ = '\0';          // lower case; only kept where case is ignored
};

}  // namespace

std::string to_pcre2(std::string_view pattern) {
  return Rewriter(pattern).run();
}

}  // namespace lighter::tokenizer
