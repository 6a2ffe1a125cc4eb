// Software prefetch of the weights that one thread will read, a constant distance ahead, also over the ends
// of rows, matrices and slices, where the processor's own prefetcher starts anew. The kernels ask for a line
// for each line that they use. Not thread-safe; the ranges belong to the caller and outlive the stream.
#pragma once

#include <cstdint>

namespace lighter {

// Rows of one matrix of a packed slice, or the same columns of them.
struct PrefetchRange {
  const uint8_t* values = nullptr;  // of the first row
  int64_t row_bytes = 0;
  int64_t row_stride = 0;
  int64_t rows = 0;
  const uint16_t* scales = nullptr;    // of the first row
  const uint16_t* minimums = nullptr;  // int4
  int64_t head_bytes = 0;              // of scales (and of minimums) to ask for when the range begins
};

class PrefetchStream {
 public:
  PrefetchStream() = default;
  PrefetchStream(const PrefetchRange* begin, const PrefetchRange* end) : next_(begin), last_(end) {}

  // One more line.
  void ask() {
    if (at_ >= row_end_ && !advance()) return;
    __builtin_prefetch(at_, 0, 3);
    at_ += 64;
  }
  void ask_bytes(int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) ask();
  }

 private:
  bool advance() {
    if (rows_left_ == 0) {
      if (next_ == last_) return false;
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
  static void ask_head(const uint16_t* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) {
      __builtin_prefetch(reinterpret_cast<const uint8_t*>(from) + i, 0, 3);
    }
  }

  const uint8_t* at_ = nullptr;
  const uint8_t* row_end_ = nullptr;
  const uint8_t* row_ = nullptr;  // the next
  int64_t row_bytes_ = 0;
  int64_t stride_ = 0;
  int64_t rows_left_ = 0;
  const PrefetchRange* next_ = nullptr;
  const PrefetchRange* last_ = nullptr;
};

}  // namespace lighter
