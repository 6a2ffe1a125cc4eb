#include "runtime/quant/dequantize.h"

#include "runtime/float_convert.h"

namespace lighter {

float packed_value(const PackedSliceLayout& layout, const std::byte* slice, SliceMatrix matrix, int64_t row,
                   int64_t column) {
  const PackedMatrix& part = layout[matrix];
  const int64_t index = row * part.columns + column;
  const int64_t size = group_size(layout.encoding);
  const int64_t group = index / size;
  const float scale = fp16_to_fp32(reinterpret_cast<const uint16_t*>(slice + part.scales_at)[group]);
  if (layout.encoding == SliceEncoding::int8) {
    return scale * static_cast<float>(reinterpret_cast<const int8_t*>(slice + part.values_at)[index]);
  }
  const int64_t in_group = index % size;
  const auto both = static_cast<unsigned>(slice[part.values_at + group * (size / 2) + in_group % (size / 2)]);
  const unsigned q = in_group < size / 2 ? both & 15u : both >> 4;
  const float minimum = fp16_to_fp32(reinterpret_cast<const uint16_t*>(slice + part.minimums_at)[group]);
  return scale * static_cast<float>(q) + minimum;
}

void dequantize_row(const PackedSliceLayout& layout, const std::byte* slice, SliceMatrix matrix, int64_t row,
                    float* values) {
  const int64_t columns = layout[matrix].columns;
  for (int64_t column = 0; column < columns; ++column) {
    values[column] = packed_value(layout, slice, matrix, row, column);
  }
}

void dequantize_matrix(const PackedSliceLayout& layout, const std::byte* slice, SliceMatrix matrix,
                       float* values) {
  const PackedMatrix& part = layout[matrix];
  for (int64_t row = 0; row < part.rows; ++row) {
    dequantize_row(layout, slice, matrix, row, values + row * part.columns);
  }
}

}  // namespace lighter
