#include "runtime/tokenizer/added_tokens.h"

#include <algorithm>

#include "runtime/tokenizer/regex.h"
#include "runtime/tokenizer/utf8.h"

namespace lighter::tokenizer {
namespace {

// \w as Rust's regex crate has it: Alphabetic, marks, decimal digits, connectors and the two joiners. Beyond
// the categories, Alphabetic holds the circled and squared Latin letters.
bool is_word_character(std::string_view character) {
  static const Regex word(
      R"([\p{L}\p{M}\p{Nd}\p{Nl}\p{Pc}\x{200c}\x{200d}\x{24b6}-\x{24e9}\x{1f130}-\x{1f149})"
      R"(\x{1f150}-\x{1f169}\x{1f170}-\x{1f189}])");
  return word.matches_anywhere(character);
}

bool touches_word(std::string_view text, std::size_t begin, std::size_t end) {
  if (begin > 0) {
    std::size_t last = begin - 1;
    while (last > 0 && (static_cast<unsigned char>(text[last]) & 0xC0) == 0x80) --last;
    if (is_word_character(text.substr(last, begin - last))) return true;
  }
  return end < text.size() && is_word_character(text.substr(end, first_char(text.substr(end)).length));
}

}  // namespace

void AddedTokenFinder::add(const AddedToken& token) {
  if (token.pattern.empty()) return;
  std::uint32_t node = 0;
  for (const char c : token.pattern) {
    std::uint32_t next = child(node, c);
    if (next == 0) {
      next = static_cast<std::uint32_t>(nodes_.size());
      nodes_[node].children.emplace_back(c, next);
      nodes_.emplace_back();
    }
    node = next;
  }
  if (nodes_[node].token >= 0) return;
  nodes_[node].token = static_cast<std::int32_t>(tokens_.size());
  tokens_.push_back(token);
}

std::uint32_t AddedTokenFinder::child(std::uint32_t node, char c) const {
  for (const auto& [byte, next] : nodes_[node].children) {
    if (byte == c) return next;
  }
  return 0;
}

std::int32_t AddedTokenFinder::longest_at(std::string_view text, std::size_t begin, std::size_t& end) const {
  std::int32_t token = -1;
  std::uint32_t node = 0;
  for (std::size_t i = begin; i < text.size(); ++i) {
    node = child(node, text[i]);
    if (node == 0) break;
    if (nodes_[node].token >= 0) {
      token = nodes_[node].token;
      end = i + 1;
    }
  }
  return token;
}

std::vector<Section> AddedTokenFinder::find(std::string_view text, bool parse_special) const {
  std::vector<Section> sections;
  std::size_t covered = 0;
  for (std::size_t at = 0; at < text.size();) {
    std::size_t begin = at, end = at;
    const std::int32_t index = longest_at(text, begin, end);
    if (index < 0) {
      ++at;
      continue;
    }
    at = end;
    const AddedToken& token = tokens_[static_cast<std::size_t>(index)];
    if (token.special && !parse_special) continue;
    if (token.single_word && touches_word(text, begin, end)) continue;
    if (token.lstrip) begin = std::max(trailing_space_begin(text.substr(0, begin)), covered);
    if (token.rstrip) end += leading_space_end(text.substr(end));
    if (covered < begin) sections.push_back({-1, covered, begin});
    sections.push_back({token.id, begin, end});
    covered = end;
  }
  if (covered < text.size()) sections.push_back({-1, covered, text.size()});
  return sections;
}

}  // namespace lighter::tokenizer
