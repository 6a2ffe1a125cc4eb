// Cuts text into the pieces within which BPE merges, in the steps of tokenizer.json.
// Immutable, so thread-safe.
#pragma once

#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "runtime/tokenizer/normalizer.h"

namespace lighter::tokenizer {

// What happens to the parts that a pattern matches.
enum class SplitBehavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };

struct SplitStep {
  Pattern pattern;
  SplitBehavior behavior;
  bool invert;  // what lies between the matches counts as matched
};

// Writes every byte as one printable character (GPT-2's table), after an optional split by GPT-2's pattern.
struct ByteLevelStep {
  bool add_prefix_space;
  bool use_regex;
};

enum class PrependScheme { always, first, never };

// Writes spaces as `replacement`, puts one in front, and cuts before each.
struct MetaspaceStep {
  std::string replacement;  // one character
  PrependScheme prepend;    // first: only where the text itself begins
  bool split;
};

using PreTokenizerStep = std::variant<SplitStep, ByteLevelStep, MetaspaceStep>;

class PreTokenizer {
 public:
  void add(PreTokenizerStep step) { steps_.push_back(std::move(step)); }

  // section: valid UTF-8; at_text_start: whether it begins where the whole text begins.
  std::vector<std::string> pieces(std::string section, bool at_text_start) const;

 private:
  std::vector<PreTokenizerStep> steps_;
};

// GPT-2's table: the character that stands for a byte, in UTF-8 …
std::string_view byte_level_character(unsigned char byte);
// … and the byte that a character stands for, or -1.
int byte_level_byte(char32_t character);

}  // namespace lighter::tokenizer
