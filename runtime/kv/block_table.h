// Which KV blocks a sequence holds, for one group of layers. Layers that attend to everything keep every
// position; layers that attend within chunks keep only the current chunk, whose blocks are written again when
// the next one begins.
//
// Pure book-keeping; not thread-safe.
#pragma once

#include <cstdint>
#include <vector>

namespace lighter {

class BlockTable {
 public:
  // window: positions kept; 0: all of context. context: positions a sequence may reach. block divides window.
  BlockTable(int64_t block, int64_t window, int64_t context, int sequences);

  int64_t blocks_per_sequence() const { return blocks_per_sequence_; }
  int64_t total_blocks() const { return blocks_per_sequence_ * static_cast<int64_t>(held_.size()); }

  // Makes sure that the sequence has the block of every position up to last. Throws CapacityError.
  void extend(int sequence, int64_t last);
  void release(int sequence);

  // Row of the key at this position in the group's storage.
  int64_t row(int sequence, int64_t position) const;
  const std::vector<int64_t>& blocks(int sequence) const { return held_[sequence]; }
  // The first position that a query at `position` may attend to.
  int64_t first_visible(int64_t position) const { return window_ == 0 ? 0 : position / window_ * window_; }

 private:
  const int64_t block_;
  const int64_t window_;
  const int64_t context_;
  const int64_t blocks_per_sequence_;
  std::vector<std::vector<int64_t>> held_;  // by sequence: its blocks in order
  std::vector<int64_t> free_;
};

}  // namespace lighter
