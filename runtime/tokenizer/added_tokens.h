// The tokens that are found in text before anything else happens to it (special tokens and user-defined
// ones).
//
// At each position the longest token wins, and a match begins as far left as possible. A token that is
// refused where it stands (not a single word, or special ones while they are to be read as text) is passed
// over whole. Immutable once built, so thread-safe. The rules are those of the `tokenizers` package.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lighter::tokenizer {

struct AddedToken {
  std::string content;
  std::int64_t id = -1;
  bool special = false;      // skipped by decode(skip_special)
  bool single_word = false;  // must not touch a word character
  bool lstrip = false;       // takes the white space on its left with it
  bool rstrip = false;
  bool normalized = true;  // looked for in the normalized text
  std::string pattern{};   // what is looked for: the content, normalized if `normalized`
};

// A part of a text: an added token, or, with id -1, text still to be encoded.
struct Section {
  std::int64_t id;
  std::size_t begin;
  std::size_t end;
};

class AddedTokenFinder {
 public:
  // The first of two equal patterns counts. Empty patterns are passed over.
  void add(const AddedToken& token);

  // Sections in order, covering text. parse_special: whether special tokens are looked for.
  std::vector<Section> find(std::string_view text, bool parse_special) const;

 private:
  struct Node {
    std::vector<std::pair<char, std::uint32_t>> children;
    std::int32_t token = -1;
  };
  std::int32_t longest_at(std::string_view text, std::size_t begin, std::size_t& end) const;
  std::uint32_t child(std::uint32_t node, char c) const;

  std::vector<Node> nodes_ = std::vector<Node>(1);  // a trie of bytes; the root is 0, which is no one's child
  std::vector<AddedToken> tokens_;
};

}  // namespace lighter::tokenizer
