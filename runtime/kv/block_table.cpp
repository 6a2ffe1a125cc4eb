#include "runtime/kv/block_table.h"

#include <algorithm>

#include "runtime/error.h"

namespace lighter {

BlockTable::BlockTable(int64_t block, int64_t window, int64_t context, int sequences)
    : block_(block),
      window_(window),
      context_(context),
      blocks_per_sequence_(((window == 0 ? context : std::min(window, context)) + block - 1) / block),
      held_(sequences) {
  for (int64_t i = total_blocks(); i-- > 0;) free_.push_back(i);
}

void BlockTable::extend(int sequence, int64_t last) {
  if (last >= context_) {
    throw CapacityError("position " + std::to_string(last) + " is beyond memory.context of " +
                        std::to_string(context_) + " tokens; raise it or shorten the prompt");
  }
  // Once a position lies in a later chunk, the earlier one filled all of the window's blocks.
  const int64_t highest = window_ == 0 || last < window_ ? last : window_ - 1;
  auto& blocks = held_[sequence];
  while (static_cast<int64_t>(blocks.size()) <= highest / block_) {
    if (free_.empty()) throw CapacityError("the KV cache has no free block left");
    blocks.push_back(free_.back());
    free_.pop_back();
  }
}

void BlockTable::release(int sequence) {
  auto& blocks = held_[sequence];
  free_.insert(free_.end(), blocks.rbegin(), blocks.rend());
  blocks.clear();
}

int64_t BlockTable::row(int sequence, int64_t position) const {
  const int64_t at = window_ == 0 ? position : position % window_;
  return held_[sequence][at / block_] * block_ + at % block_;
}

}  // namespace lighter
