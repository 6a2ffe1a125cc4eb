// Software prefetch of the weights that one thread will read, a constant distance ahead, also over the ends
// of rows, matrices and slices, where the processor's own prefetcher starts anew. The kernels ask for a line
// for each line that they use; after a head start only for about every second one, until that is used up,
// since else they would compute no faster than memory delivers what comes after. Not thread-safe; the ranges
// belong to the caller and outlive the stream.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

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

// Where a stream gets more ranges from when it has asked for all that it knows.
class PrefetchSource {
 public:
  virtual ~PrefetchSource() = default;
  // Those that follow, valid until the next call; none: that was all.
  virtual std::span<const PrefetchRange> more() = 0;
};

class PrefetchStream {
 public:
  PrefetchStream() = default;
  PrefetchStream(const PrefetchRange* begin, const PrefetchRange* end) : next_(begin), last_(end) {}
  explicit PrefetchStream(PrefetchSource& source) : source_(&source) {}

  void ask_bytes(int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) ask_line();
  }
  // So many bytes more have been asked for beyond the usual distance.
  void add_head_start(int64_t bytes) { head_start_ += bytes; }

  // A line of weights is used.
  void ask() {
    if (__builtin_expect(head_start_ >= 64, 0) && spends(64)) return;
    ask_line();
  }

  // Takes the lines of up to `steps` steps, each of `lines` lines, that lie one after the other: the caller
  // asks for them, from the address returned. At least one step: if there are fewer lines up to the end of a
  // row, this asks for the step's lines itself; then, and if there are none left, it returns `known`, which
  // may be asked for again.
  const uint8_t* take_steps(int64_t lines, int64_t& steps, const uint8_t* known) {
    if (__builtin_expect(head_start_ >= 64 * lines, 0)) {
      steps = std::min(steps, head_start_ / (64 * lines));
      if (spends(64 * lines * steps)) return known;
    }
    const int64_t there = (row_end_ - at_) / (64 * lines);
    if (__builtin_expect(there <= 0, 0)) {
      if (ended_) return known;
      ask_bytes(64 * lines);
      steps = 1;
      return known;
    }
    if (there < steps) steps = there;
    const uint8_t* from = at_;
    at_ += 64 * lines * steps;
    return from;
  }

 private:
  bool advance();
  void ask_line() {
    if (at_ >= row_end_ && !advance()) return;
    __builtin_prefetch(at_, 0, 2);
    at_ += 64;
  }
  bool spends(int64_t bytes) {
    spends_ = !spends_;
    if (spends_) head_start_ -= bytes;
    return spends_;
  }

  const uint8_t* at_ = nullptr;
  const uint8_t* row_end_ = nullptr;
  const uint8_t* row_ = nullptr;  // the next
  int64_t row_bytes_ = 0;
  int64_t stride_ = 0;
  int64_t rows_left_ = 0;
  const PrefetchRange* next_ = nullptr;
  const PrefetchRange* last_ = nullptr;
  PrefetchSource* source_ = nullptr;
  int64_t head_start_ = 0;
  bool spends_ = false;
  bool ended_ = false;
};

}  // namespace lighter
