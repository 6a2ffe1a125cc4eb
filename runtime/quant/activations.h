// Rows of activations, quantized to int8 as the packed slices' kernels take them: the operand that every row
// of a weight matrix is multiplied with.
//
// Symmetric in groups of the weights' group size: a = scale * q, scale = max|a| / 127 in fp32, q = rint(a /
// scale); a group of zeros has scale 0 and q 0. A group that holds a NaN or an infinity gets scale NaN, so
// that it shows in the results. Grows and keeps its memory. Reading is thread-safe, and so are assign_row()
// and assign_quantized_row() of different rows; the others are not.
#pragma once

#include <tbb/cache_aligned_allocator.h>

#include <cstdint>
#include <vector>

#include "runtime/quant/packed_slice.h"

namespace lighter {

class QuantizedActivations {
 public:
  // 16 rows of weights are multiplied at a time, and their 16 * groups() scales taken 16 at a time, so that
  // the activations' scales are read periodically: scales() repeats its first 16 at the end.
  static constexpr int64_t kRepeat = 16;
  // 32-bit lanes of a dot product: lane l sums what lies at bytes 4l to 4l + 3 of each 64 bytes of values().
  static constexpr int64_t kLanes = 16;

  // x: [tokens, columns], any alignment. columns: a multiple of the group size. encoding: int8 or int4.
  void assign(SliceEncoding encoding, const float* x, int64_t tokens, int64_t columns);
  // The same in steps: room for the rows, then each row.
  void resize(SliceEncoding encoding, int64_t tokens, int64_t columns);
  // weight * x: x is quantized, its scales times weight. columns values.
  void assign_row(int64_t token, const float* x, float weight = 1);
  // The same for what is quantized already: q [columns], in order, and scales [groups].
  void assign_quantized_row(int64_t token, const int8_t* q, const float* scales, float weight = 1);

  // Another one after each resize() or assign() of any object; whoever keeps what he made of the rows goes by
  // it, so that a row is assigned but once after each.
  uint64_t version() const { return version_; }
  SliceEncoding encoding() const { return encoding_; }
  int64_t tokens() const { return tokens_; }
  int64_t columns() const { return columns_; }
  int64_t groups() const { return groups_; }
  // groups() rounded up to the 16 that minima are multiplied in.
  int64_t padded_groups() const { return (groups_ + kLanes - 1) / kLanes * kLanes; }

  // [columns]. int8: in order. int4: like the weights' nibbles, two groups A, B to 128 bytes:
  // A[0, 32) B[0, 32) A[32, 64) B[32, 64); after an odd number of groups, one of zeros.
  const int8_t* values(int64_t token) const { return values_.data() + token * row_bytes(); }
  // [groups + kRepeat].
  const float* scales(int64_t token) const { return scales_.data() + token * (groups_ + kRepeat); }
  // int8: [groups, kLanes], -128 * the sum of a lane's values: VNNI multiplies unsigned by signed bytes, so
  // the weights get 128 added, and this takes it off.
  const int32_t* corrections(int64_t token) const { return corrections_.data() + token * groups_ * kLanes; }
  // int4: [padded_groups], scale * sum of the group's values: what a weight group's minimum is multiplied
  // with.
  const float* scaled_sums(int64_t token) const { return scaled_sums_.data() + token * padded_groups(); }

 private:
  int64_t row_bytes() const { return (columns_ + 127) / 128 * 128; }
  int8_t* mutable_values(int64_t token) { return values_.data() + token * row_bytes(); }
  float* mutable_scales(int64_t token) { return scales_.data() + token * (groups_ + kRepeat); }
  void complete_row(int64_t token, float weight);
  void correct_lanes(int64_t token);
  void interleave_pairs(int64_t token);

  uint64_t version_ = 0;
  SliceEncoding encoding_ = SliceEncoding::int8;
  int64_t tokens_ = 0;
  int64_t columns_ = 0;
  int64_t groups_ = 0;
  // Of cache lines, as they are read.
  std::vector<int8_t, tbb::cache_aligned_allocator<int8_t>> values_;
  std::vector<float> scales_;
  std::vector<int32_t, tbb::cache_aligned_allocator<int32_t>> corrections_;
  std::vector<float> scaled_sums_;
};

}  // namespace lighter
