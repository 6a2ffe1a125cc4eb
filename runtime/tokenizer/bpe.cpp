#include "runtime/tokenizer/bpe.h"

#include <algorithm>
#include <string>
#include <utility>

#include "runtime/tokenizer/utf8.h"

namespace lighter::tokenizer {
namespace {

// std::*_heap keeps the greatest in front: the lowest rank, then the leftmost, must compare greatest.
bool later(const Bpe::Candidate& a, const Bpe::Candidate& b) {
  return a.rank != b.rank ? a.rank > b.rank : a.position > b.position;
}

void append_symbol(std::vector<Bpe::Symbol>& symbols, std::int32_t id) {
  const auto index = static_cast<std::int32_t>(symbols.size());
  if (index > 0) symbols.back().next = index;
  symbols.push_back({id, index - 1, -1, false});
}

}  // namespace

Bpe::Bpe(Vocabulary vocabulary, MergeTable merges, BpeOptions options)
    : vocabulary_(std::move(vocabulary)), merges_(std::move(merges)), options_(options) {
  const char* digits = "0123456789ABCDEF";
  for (unsigned byte = 0; byte < byte_ids_.size(); ++byte) {
    byte_ids_[byte] = vocabulary_.id(std::string("<0x") + digits[byte >> 4] + digits[byte & 15] + ">");
  }
  for (unsigned c = 0; c < short_ids_.size(); ++c) {
    std::string text;
    append_utf8(text, c);
    short_ids_[c] = vocabulary_.id(text);
  }
}

void Bpe::encode(std::string_view piece, std::vector<std::int64_t>& out, Scratch& scratch) const {
  if (piece.empty()) return;
  if (options_.ignore_merges) {
    if (const std::int32_t id = vocabulary_.id(piece); id >= 0) {
      out.push_back(id);
      return;
    }
  }
  start_symbols(piece, scratch.symbols);
  merge_all(scratch);
  for (const Symbol& symbol : scratch.symbols) {
    if (!symbol.merged_away) out.push_back(symbol.id);
  }
}

void Bpe::start_symbols(std::string_view piece, std::vector<Symbol>& symbols) const {
  symbols.clear();
  bool unk_pending = false;
  while (!piece.empty()) {
    const Utf8Char c = first_char(piece);
    const std::string_view character = piece.substr(0, c.length);
    piece.remove_prefix(c.length);
    const std::int32_t id =
        c.code_point < short_ids_.size() ? short_ids_[c.code_point] : vocabulary_.id(character);
    if (id >= 0) {
      if (unk_pending) append_symbol(symbols, options_.unk_id);
      unk_pending = false;
      append_symbol(symbols, id);
      continue;
    }
    // A pending unknown token stays pending across byte tokens and so lands after them. That is what the
    // reference does, and the ids have to be the same.
    if (options_.byte_fallback && append_bytes(character, symbols)) continue;
    if (options_.unk_id < 0) continue;
    if (unk_pending && !options_.fuse_unk) append_symbol(symbols, options_.unk_id);
    unk_pending = true;
  }
  if (unk_pending) append_symbol(symbols, options_.unk_id);
}

bool Bpe::append_bytes(std::string_view character, std::vector<Symbol>& symbols) const {
  const auto byte_id = [&](char c) { return byte_ids_[static_cast<unsigned char>(c)]; };
  if (std::any_of(character.begin(), character.end(), [&](char c) { return byte_id(c) < 0; })) return false;
  for (const char c : character) append_symbol(symbols, byte_id(c));
  return true;
}

void Bpe::merge_all(Scratch& scratch) const {
  std::vector<Symbol>& symbols = scratch.symbols;
  std::vector<Candidate>& heap = scratch.heap;
  heap.clear();
  const auto at = [&](std::int32_t position) -> Symbol& {
    return symbols[static_cast<std::size_t>(position)];
  };
  const auto candidate = [&](std::int32_t position) {
    const std::int32_t next = at(position).next;
    if (next < 0) return false;
    const MergeTable::Merge* merge = merges_.find(at(position).id, at(next).id);
    if (merge != nullptr) heap.push_back({merge->rank, position, merge->merged});
    return merge != nullptr;
  };
  for (std::size_t i = 0; i + 1 < symbols.size(); ++i) candidate(static_cast<std::int32_t>(i));
  std::make_heap(heap.begin(), heap.end(), later);
  while (!heap.empty()) {
    const Candidate best = heap.front();
    std::pop_heap(heap.begin(), heap.end(), later);
    heap.pop_back();
    Symbol& left = at(best.position);
    if (left.merged_away || left.next < 0) continue;
    // The entry may be older than a merge of its left or right part.
    const MergeTable::Merge* current = merges_.find(left.id, at(left.next).id);
    if (current == nullptr || current->merged != best.merged) continue;
    Symbol& right = at(left.next);
    left.id = best.merged;
    left.next = right.next;
    right.merged_away = true;
    if (left.next >= 0) at(left.next).previous = best.position;
    if (left.previous >= 0 && candidate(left.previous)) std::push_heap(heap.begin(), heap.end(), later);
    if (candidate(best.position)) std::push_heap(heap.begin(), heap.end(), later);
  }
}

}  // namespace lighter::tokenizer
