#include "runtime/quant/activations.h"

#include <algorithm>
#include <bit>
#include <limits>

namespace lighter {
namespace {

// max|value| as the bits of a float, which order like the numbers and put infinity and NaN above them.
int32_t magnitude_bits(const float* values, int64_t count) {
  int32_t most = 0;
  for (int64_t i = 0; i < count; ++i) most = std::max(most, std::bit_cast<int32_t>(values[i]) & 0x7FFFFFFF);
  return most;
}

// Returns the scale.
float quantize(const float* values, int64_t count, int8_t* q) {
  const float most = std::bit_cast<float>(magnitude_bits(values, count));
  const bool finite = most <= std::numeric_limits<float>::max();
  const float scale = finite ? most / 127.0f : std::numeric_limits<float>::quiet_NaN();
  if (!finite || scale == 0) {
    std::fill_n(q, count, int8_t{0});
    return scale;
  }
  for (int64_t i = 0; i < count; ++i) {
    // Clamped, because a subnormal scale can be much less than most / 127. Adding 1.5 * 2^23 rounds to
    // nearest.
    const float steps = std::min(127.0f, std::max(-127.0f, values[i] / scale));
    q[i] = static_cast<int8_t>(std::bit_cast<int32_t>(steps + 12582912.0f) - 0x4B400000);
  }
  return scale;
}

}  // namespace

void QuantizedActivations::assign(SliceEncoding encoding, const float* x, int64_t tokens, int64_t columns) {
  encoding_ = encoding;
  tokens_ = tokens;
  columns_ = columns;
  groups_ = columns / group_size(encoding);
  const auto grow = [](auto& vector, int64_t size) {
    if (static_cast<int64_t>(vector.size()) < size) vector.resize(size);
  };
  grow(values_, tokens * columns);
  grow(scales_, tokens * (groups_ + kRepeat));
  if (encoding == SliceEncoding::int8) {
    grow(corrections_, tokens * groups_ * kLanes);
  } else {
    grow(scaled_sums_, tokens * padded_groups());
  }
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t group = 0; group < groups_; ++group) assign_group(x + token * columns, token, group);
    float* scales = scales_.data() + token * (groups_ + kRepeat);
    for (int64_t i = 0; i < kRepeat; ++i) scales[groups_ + i] = scales[i];
    if (encoding == SliceEncoding::int8) continue;
    float* sums = scaled_sums_.data() + token * padded_groups();
    std::fill(sums + groups_, sums + padded_groups(), 0.0f);
  }
}

void QuantizedActivations::assign_group(const float* x, int64_t token, int64_t group) {
  const int64_t size = group_size(encoding_);
  int8_t* values = values_.data() + token * columns_;
  float& scale = scales_[token * (groups_ + kRepeat) + group];
  if (encoding_ == SliceEncoding::int8) {
    int8_t* q = values + group * size;
    scale = quantize(x + group * size, size, q);
    int32_t* corrections = corrections_.data() + (token * groups_ + group) * kLanes;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      int32_t sum = 0;
      for (int64_t i = 0; i < 4; ++i) sum += q[4 * lane + i] + q[64 + 4 * lane + i];
      corrections[lane] = -128 * sum;
    }
    return;
  }
  int8_t q[64];
  scale = quantize(x + group * size, size, q);
  int32_t sum = 0;
  for (const int8_t value : q) sum += value;
  int8_t* pair = values + group / 2 * 128 + group % 2 * 32;
  std::copy_n(q, 32, pair);
  std::copy_n(q + 32, 32, pair + 64);
  scaled_sums_[token * padded_groups() + group] = scale * static_cast<float>(sum);
}

}  // namespace lighter
