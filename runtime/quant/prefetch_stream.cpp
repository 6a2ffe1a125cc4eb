#include "runtime/quant/prefetch_stream.h"

namespace lighter {
namespace {

void ask_head(const uint16_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(reinterpret_cast<const uint8_t*>(from) + i, 0, 3);
  }
}

}  // namespace

bool PrefetchStream::advance() {
  if (rows_left_ == 0) {
    if (next_ == last_) {
      if (source_ != nullptr && !ended_) {
        const auto ranges = source_->more();
        next_ = ranges.data();
        last_ = next_ + ranges.size();
      }
      if (next_ == last_) {
        ended_ = true;
        return false;
      }
    }
    const PrefetchRange& range = *next_++;
    const bool whole = range.row_bytes == range.row_stride;  // one run of bytes
    row_ = range.values;
    row_bytes_ = whole ? range.rows * range.row_bytes : range.row_bytes;
    stride_ = range.row_stride;
    rows_left_ = whole ? 1 : range.rows;
    ask_head(range.scales, range.head_bytes);
    if (range.minimums != nullptr) ask_head(range.minimums, range.head_bytes);
  }
  --rows_left_;
  at_ = row_;
  row_end_ = row_ + row_bytes_;
  row_ += stride_;
  return true;
}

}  // namespace lighter
