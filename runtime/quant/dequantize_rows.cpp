#include "runtime/quant/dequantize_rows.h"

#include <tbb/parallel_for.h>

#include <algorithm>

#include "runtime/float_convert.h"

namespace lighter {
namespace {

constexpr int64_t kRowsAtOnce = 16;  // of one task

void int8_group(const std::byte* q, float scale, float* to) {
  const auto* values = reinterpret_cast<const int8_t*>(q);
  for (int i = 0; i < 128; ++i) to[i] = scale * static_cast<float>(values[i]);
}

void int4_group(const std::byte* q, float scale, float minimum, float* to) {
  const auto* both = reinterpret_cast<const uint8_t*>(q);
  for (int i = 0; i < 32; ++i) {
    to[i] = scale * static_cast<float>(both[i] & 15) + minimum;
    to[i + 32] = scale * static_cast<float>(both[i] >> 4) + minimum;
  }
}

void dequantize_row(SliceEncoding encoding, const PackedMatrix& matrix, const std::byte* data, int64_t row,
                    DType dtype, void* to) {
  const int64_t group = group_size(encoding);
  const int64_t group_bytes = encoding == SliceEncoding::int8 ? group : group / 2;
  const int64_t groups = matrix.columns / group;
  const std::byte* q = data + matrix.values_at + row * groups * group_bytes;
  const auto* scales = reinterpret_cast<const uint16_t*>(data + matrix.scales_at) + row * groups;
  const auto* minimums = reinterpret_cast<const uint16_t*>(data + matrix.minimums_at) + row * groups;
  float values[128];
  for (int64_t g = 0; g < groups; ++g, q += group_bytes) {
    float* out = dtype == DType::fp32 ? static_cast<float*>(to) + g * group : values;
    if (encoding == SliceEncoding::int8) {
      int8_group(q, fp16_to_fp32(scales[g]), out);
    } else {
      int4_group(q, fp16_to_fp32(scales[g]), fp16_to_fp32(minimums[g]), out);
    }
    if (dtype == DType::bf16) {
      fp32_to_bf16(values, static_cast<uint16_t*>(to) + g * group, static_cast<size_t>(group));
    }
  }
}

}  // namespace

void dequantize_rows(SliceEncoding encoding, const PackedMatrix& matrix, const std::byte* data, int64_t first,
                     int64_t count, DType dtype, void* to, int64_t stride) {
  const int64_t row_bytes = stride * static_cast<int64_t>(dtype_size(dtype));
  tbb::parallel_for(int64_t{0}, (count + kRowsAtOnce - 1) / kRowsAtOnce, [&](int64_t block) {
    const int64_t end = std::min(count, (block + 1) * kRowsAtOnce);
    for (int64_t i = block * kRowsAtOnce; i < end; ++i) {
      dequantize_row(encoding, matrix, data, first + i, dtype, static_cast<std::byte*>(to) + i * row_bytes);
    }
  });
}

}  // namespace lighter
