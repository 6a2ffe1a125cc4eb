#include "runtime/tokenizer/pre_tokenizer.h"

#include <algorithm>
#include <array>

#include "runtime/tokenizer/utf8.h"

namespace lighter::tokenizer {
namespace {

// Bytes that are printable Latin-1 stand for themselves; the others become U+0100, U+0101, … in order.
constexpr bool stands_for_itself(unsigned byte) {
  return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
}

struct ByteTable {
  std::array<std::string, 256> characters;
  std::array<std::int16_t, 0x144> bytes{};
  ByteTable() {
    bytes.fill(-1);
    char32_t next = 0x100;
    for (unsigned byte = 0; byte < 256; ++byte) {
      const char32_t character = stands_for_itself(byte) ? byte : next++;
      append_utf8(characters[byte], character);
      bytes[character] = static_cast<std::int16_t>(byte);
    }
  }
};

const ByteTable& byte_table() {
  static const ByteTable table;
  return table;
}

const Regex& gpt2_pattern() {
  static const Regex regex(R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)");
  return regex;
}

// The reference walks merged_with_next from the end; both merges look at one neighbour only.
std::vector<Span> combine(std::vector<Span> spans, SplitBehavior behavior) {
  const bool backwards = behavior == SplitBehavior::merged_with_next;
  if (backwards) std::reverse(spans.begin(), spans.end());
  std::vector<Span> out;
  bool previous_match = false;
  for (const Span& span : spans) {
    bool joins = false;
    switch (behavior) {
      case SplitBehavior::removed:
        if (span.is_match) continue;
        break;
      case SplitBehavior::isolated:
        break;
      case SplitBehavior::contiguous:
        joins = span.is_match == previous_match;
        break;
      case SplitBehavior::merged_with_previous:
      case SplitBehavior::merged_with_next:
        joins = span.is_match && !previous_match;
        break;
    }
    if (joins && !out.empty()) {
      out.back().begin = std::min(out.back().begin, span.begin);
      out.back().end = std::max(out.back().end, span.end);
    } else {
      out.push_back(span);
    }
    previous_match = span.is_match;
  }
  if (backwards) std::reverse(out.begin(), out.end());
  return out;
}

void append_spans(const std::string& text, const std::vector<Span>& spans, std::vector<std::string>& out) {
  for (const Span& span : spans) {
    if (span.end > span.begin) out.push_back(text.substr(span.begin, span.end - span.begin));
  }
}

void run(const SplitStep& step, std::string piece, bool, std::vector<std::string>& out) {
  std::vector<Span> spans = cut(piece, step.pattern);
  if (step.invert) {
    for (Span& span : spans) span.is_match = !span.is_match;
  }
  append_spans(piece, combine(std::move(spans), step.behavior), out);
}

void run(const ByteLevelStep& step, std::string piece, bool, std::vector<std::string>& out) {
  if (step.add_prefix_space && piece.front() != ' ') piece.insert(0, " ");
  const std::size_t first = out.size();
  if (step.use_regex) {
    append_spans(piece, gpt2_pattern().cut(piece), out);
  } else {
    out.push_back(std::move(piece));
  }
  for (std::size_t i = first; i < out.size(); ++i) {
    std::string written;
    written.reserve(out[i].size() * 2);
    for (const char c : out[i]) written += byte_level_character(static_cast<unsigned char>(c));
    out[i] = std::move(written);
  }
}

void run(const MetaspaceStep& step, std::string piece, bool at_text_start, std::vector<std::string>& out) {
  piece = replace_all(piece, " ", step.replacement);
  const bool starts_with_it = piece.compare(0, step.replacement.size(), step.replacement) == 0;
  const bool wanted =
      step.prepend == PrependScheme::always || (step.prepend == PrependScheme::first && at_text_start);
  if (wanted && !starts_with_it) piece.insert(0, step.replacement);
  if (step.split) {
    append_spans(piece, combine(cut(piece, step.replacement), SplitBehavior::merged_with_next), out);
  } else {
    out.push_back(std::move(piece));
  }
}

}  // namespace

std::string_view byte_level_character(unsigned char byte) {
  return byte_table().characters[byte];
}

int byte_level_byte(char32_t character) {
  const ByteTable& table = byte_table();
  return character < table.bytes.size() ? table.bytes[character] : -1;
}

std::vector<std::string> PreTokenizer::pieces(std::string section, bool at_text_start) const {
  std::vector<std::string> pieces;
  if (!section.empty()) pieces.push_back(std::move(section));
  for (const PreTokenizerStep& step : steps_) {
    std::vector<std::string> finer;
    finer.reserve(pieces.size());
    for (std::size_t i = 0; i < pieces.size(); ++i) {
      const bool first = at_text_start && i == 0;
      std::visit([&](const auto& s) { run(s, std::move(pieces[i]), first, finer); }, step);
    }
    pieces = std::move(finer);
  }
  return pieces;
}

}  // namespace lighter::tokenizer
