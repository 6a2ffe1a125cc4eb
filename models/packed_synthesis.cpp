#include "models/packed_synthesis.h"

#include <tbb/parallel_for.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "runtime/quant/half.h"

namespace lighter::models {
namespace {

constexpr int64_t kGrain = int64_t{1} << 20;  // bytes of q to a task

// -128 must not occur, so it becomes 0: that keeps the mean.
constexpr uint64_t without_least(uint64_t eight) {
  constexpr uint64_t low_bits = 0x7F7F7F7F7F7F7F7Fu;
  const uint64_t y = eight ^ 0x8080808080808080u;  // 0 where the byte is -128
  const uint64_t is_least = ~(((y & low_bits) + low_bits) | y | low_bits);
  return eight ^ is_least;
}
static_assert(without_least(0x80FF7F0001800081u) == 0x00FF7F0001000081u);

void draw_block(SliceEncoding encoding, uint64_t key, int64_t first, int64_t count, std::byte* to) {
  const uint64_t start = key + static_cast<uint64_t>(first) / 8;
  const auto fill = [&](auto finish) {
    for (int64_t i = 0; i < count / 8; ++i) {
      const uint64_t eight = finish(splitmix64(start + static_cast<uint64_t>(i)));
      std::memcpy(to + i * 8, &eight, sizeof eight);
    }
  };
  if (encoding == SliceEncoding::int8) {
    fill(without_least);
  } else {
    fill([](uint64_t sixteen) { return sixteen; });
  }
}

constexpr int kScales = 16;  // that occur, evenly spread from 3/4 to 5/4 of their middle

// Deviations of q: uniform whole numbers, -128 to 127 but 0 for -128, and 0 to 15.
double deviation_of_q(SliceEncoding encoding) {
  if (encoding == SliceEncoding::int4) return std::sqrt((256.0 - 1) / 12);
  double squares = 0;
  for (int q = -127; q <= 127; ++q) squares += q * q;
  return std::sqrt(squares / 256);
}

struct ScaleTable {
  std::array<uint16_t, kScales> scales{}, minimums{};
};

ScaleTable scale_table(SliceEncoding encoding, float deviation) {
  std::array<double, kScales> factors{};
  double squares = 0;
  for (int i = 0; i < kScales; ++i) {
    factors[i] = 0.75 + 0.5 * (i + 0.5) / kScales;
    squares += factors[i] * factors[i];
  }
  const double unit = deviation / deviation_of_q(encoding) / std::sqrt(squares / kScales);
  ScaleTable table;
  for (int i = 0; i < kScales; ++i) {
    table.scales[i] = fp32_to_fp16(static_cast<float>(factors[i] * unit));
    table.minimums[i] = fp32_to_fp16(-7.5f * fp16_to_fp32(table.scales[i]));
  }
  return table;
}

}  // namespace

void draw_packed_values(SliceEncoding encoding, uint64_t key, int64_t first, int64_t count, std::byte* to) {
  if (count <= kGrain) return draw_block(encoding, key, first, count, to);
  tbb::parallel_for(int64_t{0}, (count + kGrain - 1) / kGrain, [&](int64_t block) {
    const int64_t begin = block * kGrain;
    draw_block(encoding, key, first + begin, std::min(kGrain, count - begin), to + begin);
  });
}

void draw_packed_scales(SliceEncoding encoding, uint64_t key, int64_t first, int64_t count, float deviation,
                        uint16_t* scales, uint16_t* minimums) {
  const ScaleTable table = scale_table(encoding, deviation);
  uint64_t sixteen = 0;  // choices, of 4 bits each
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t group = static_cast<uint64_t>(first + i);
    if (i == 0 || group % 16 == 0) sixteen = splitmix64(~key + group / 16);
    const auto choice = (sixteen >> (group % 16 * 4)) & 15;
    scales[i] = table.scales[choice];
    if (encoding == SliceEncoding::int4) minimums[i] = table.minimums[choice];
  }
}

void draw_packed_slice(const PackedSliceLayout& layout, uint64_t key, float into, float out_of,
                       std::byte* slice) {
  const PackedMatrix& gate = layout[SliceMatrix::gate];
  draw_packed_values(layout.encoding, key, 0, static_cast<int64_t>(gate.scales_at), slice);
  const int64_t groups = gate.rows * gate.columns / group_size(layout.encoding);
  int64_t first = 0;
  for (const SliceMatrix which : {SliceMatrix::gate, SliceMatrix::up, SliceMatrix::down}) {
    const PackedMatrix& matrix = layout[which];
    draw_packed_scales(layout.encoding, key, first, groups, which == SliceMatrix::down ? out_of : into,
                       reinterpret_cast<uint16_t*>(slice + matrix.scales_at),
                       reinterpret_cast<uint16_t*>(slice + matrix.minimums_at));
    first += groups;
  }
}

}  // namespace lighter::models
