// Two flat hash tables for vocabularies of several hundred thousand entries: one allocation per array instead
// of one per entry, so that loading takes a fraction of a second.
//
// Thread-safe for reading once filled. Strings are copied into an arena of at most 4 GiB.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace lighter::tokenizer {

// Token text ⇄ id, for ids from 0 up to the largest inserted. Texts and ids must be distinct.
class Vocabulary {
 public:
  // Room for `tokens` entries; inserting more is not allowed.
  explicit Vocabulary(std::size_t tokens) : slots_(table_size(tokens), kNone) {}

  void insert(std::string_view text, std::int32_t id) {
    if (static_cast<std::size_t>(id) >= texts_.size()) texts_.resize(static_cast<std::size_t>(id) + 1);
    texts_[static_cast<std::size_t>(id)] = {static_cast<std::uint32_t>(arena_.size()),
                                            static_cast<std::uint32_t>(text.size()), true};
    arena_ += text;
    slots_[slot(text)] = id;
    ++size_;
  }

  // -1 if there is none.
  std::int32_t id(std::string_view text) const { return slots_[slot(text)]; }
  bool has(std::int64_t id) const {
    return id >= 0 && id < id_limit() && texts_[static_cast<std::size_t>(id)].used;
  }
  // has(id) must hold.
  std::string_view text(std::int64_t id) const {
    const Text& t = texts_[static_cast<std::size_t>(id)];
    return std::string_view(arena_).substr(t.offset, t.length);
  }
  std::int64_t size() const { return size_; }
  // One more than the largest id.
  std::int64_t id_limit() const { return static_cast<std::int64_t>(texts_.size()); }

  static std::size_t table_size(std::size_t entries) {
    std::size_t size = 16;
    while (size < entries * 2) size *= 2;
    return size;
  }

 private:
  static constexpr std::int32_t kNone = -1;
  struct Text {
    std::uint32_t offset = 0;
    std::uint32_t length = 0;
    bool used = false;
  };

  // The slot that holds text, or the empty one where it belongs.
  std::size_t slot(std::string_view text) const {
    const std::size_t mask = slots_.size() - 1;
    std::size_t i = std::hash<std::string_view>{}(text)&mask;
    while (slots_[i] != kNone && this->text(slots_[i]) != text) i = (i + 1) & mask;
    return i;
  }

  std::string arena_;
  std::vector<Text> texts_;
  std::vector<std::int32_t> slots_;
  std::int64_t size_ = 0;
};

// (left id, right id) → the merge's rank and the id it makes.
class MergeTable {
 public:
  struct Merge {
    std::uint64_t pair = kNone;
    std::int32_t rank = 0;
    std::int32_t merged = 0;
  };

  explicit MergeTable(std::size_t merges) : slots_(Vocabulary::table_size(merges)) {}

  // A pair that occurs twice keeps the later rank, as in the reference.
  void insert(std::int32_t left, std::int32_t right, std::int32_t rank, std::int32_t merged) {
    const std::uint64_t pair = key(left, right);
    slots_[slot(pair)] = {pair, rank, merged};
  }

  const Merge* find(std::int32_t left, std::int32_t right) const {
    const Merge& merge = slots_[slot(key(left, right))];
    return merge.pair == kNone ? nullptr : &merge;
  }

 private:
  static constexpr std::uint64_t kNone = ~std::uint64_t{0};
  static std::uint64_t key(std::int32_t left, std::int32_t right) {
    return (static_cast<std::uint64_t>(left) << 32) | static_cast<std::uint32_t>(right);
  }
  std::size_t slot(std::uint64_t pair) const {
    const std::size_t mask = slots_.size() - 1;
    std::size_t i = ((pair * 0x9E3779B97F4A7C15u) >> 24) & mask;
    while (slots_[i].pair != kNone && slots_[i].pair != pair) i = (i + 1) & mask;
    return i;
  }

  std::vector<Merge> slots_;
};

}  // namespace lighter::tokenizer
