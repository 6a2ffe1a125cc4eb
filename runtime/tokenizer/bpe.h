// Byte-pair encoding of one piece of text: characters become symbols, and the pair of neighbours with the
// lowest merge rank is joined, the leftmost first, until none is left. O(n log n) in the piece's characters.
//
// Immutable, so thread-safe. The scratch memory belongs to one caller at a time.
// Reference: Sennrich et al. 2016; the order of merges and of unknown characters is that of the `tokenizers`
// package.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>
#include <vector>

#include "runtime/tokenizer/hash_tables.h"

namespace lighter::tokenizer {

struct BpeOptions {
  bool ignore_merges = false;  // a piece that is itself a token is taken whole
  bool byte_fallback = false;  // an unknown character becomes its bytes' tokens <0x00> … <0xFF>
  bool fuse_unk = false;       // neighbouring unknown characters become one unknown token
  std::int32_t unk_id = -1;    // -1: unknown characters are dropped
};

class Bpe {
 public:
  struct Symbol {
    std::int32_t id;
    std::int32_t previous;
    std::int32_t next;  // -1 at the end
    bool merged_away;
  };
  struct Candidate {
    std::int32_t rank;
    std::int32_t position;
    std::int32_t merged;
  };
  struct Scratch {
    std::vector<Symbol> symbols;
    std::vector<Candidate> heap;
  };

  Bpe(Vocabulary vocabulary, MergeTable merges, BpeOptions options);

  // Appends the ids of piece, which must be valid UTF-8.
  void encode(std::string_view piece, std::vector<std::int64_t>& out, Scratch& scratch) const;

  const Vocabulary& vocabulary() const { return vocabulary_; }

 private:
  void start_symbols(std::string_view piece, std::vector<Symbol>& symbols) const;
  bool append_bytes(std::string_view character, std::vector<Symbol>& symbols) const;
  void merge_all(Scratch& scratch) const;

  Vocabulary vocabulary_;
  MergeTable merges_;
  BpeOptions options_;
  std::array<std::int32_t, 256> byte_ids_;    // of <0xNN>, -1 where missing
  std::array<std::int32_t, 2048> short_ids_;  // of the characters below U+0800, -1 where missing
};

}  // namespace lighter::tokenizer
