#include "runtime/quant/quantize.h"

#include <algorithm>
#include <cassert>
#include <string>

#include "runtime/error.h"

namespace lighter {

SlicePacker::SlicePacker(SliceEncoding encoding, int64_t hidden, int64_t width, std::byte* slice)
    : layout_(packed_slice_layout(encoding, hidden, width)), slice_(slice) {}

void SlicePacker::pack_row(SliceMatrix matrix, int64_t row, const float* values) const {
  pack_part(matrix, row, 0, layout_[matrix].columns, values);
}

void SlicePacker::pack_part(SliceMatrix matrix, int64_t row, int64_t first, int64_t count,
                            const float* values) const {
  const PackedMatrix& part = layout_[matrix];
  const int64_t group = group_size(layout_.encoding);
  assert(row >= 0 && row < part.rows && first >= 0 && first + count <= part.columns);
  assert(first % group == 0 && count % group == 0);
  const int64_t value = row * part.columns + first;
  auto* scales = reinterpret_cast<uint16_t*>(slice_ + part.scales_at) + value / group;
  int64_t bad;
  if (layout_.encoding == SliceEncoding::int8) {
    bad = quantize_int8(values, count / group, reinterpret_cast<int8_t*>(slice_ + part.values_at) + value,
                        scales);
  } else {
    bad =
        quantize_int4(values, count / group, reinterpret_cast<uint8_t*>(slice_ + part.values_at) + value / 2,
                      scales, reinterpret_cast<uint16_t*>(slice_ + part.minimums_at) + value / group);
  }
  if (bad < 0) return;
  constexpr const char* names[] = {"gate", "up", "down"};
  const int64_t column = first + bad * group;
  throw CheckpointError("expert weights, " + std::string(names[static_cast<int>(matrix)]) + " row " +
                        std::to_string(row) + " of the slice, columns " + std::to_string(column) + " to " +
                        std::to_string(column + group - 1) +
                        ": a NaN, an infinity, or a magnitude above 65504 cannot be stored as " +
                        std::string(encoding_name(layout_.encoding)) +
                        "; the checkpoint is damaged, or these experts must stay dense");
}

void SlicePacker::pack_transposed(SliceMatrix matrix, int64_t first_row, int64_t rows, int64_t first,
                                  int64_t count, const float* block, int64_t stride) const {
  constexpr int64_t tile_rows = 16;  // a cache line of a block's row
  constexpr int64_t tile_columns = 128;
  float tile[tile_rows][tile_columns];
  for (int64_t i = 0; i < count; i += tile_columns) {
    const int64_t columns = std::min(tile_columns, count - i);
    for (int64_t r = 0; r < rows; r += tile_rows) {
      const int64_t height = std::min(tile_rows, rows - r);
      for (int64_t c = 0; c < columns; ++c) {
        const float* from = block + (i + c) * stride + r;
        for (int64_t k = 0; k < height; ++k) tile[k][c] = from[k];
      }
      for (int64_t k = 0; k < height; ++k) pack_part(matrix, first_row + r + k, first + i, columns, tile[k]);
    }
  }
}

void pack_slice(SliceEncoding encoding, int64_t hidden, int64_t width, const float* gate, const float* up,
                const float* down, std::byte* slice) {
  const SlicePacker packer(encoding, hidden, width, slice);
  for (int64_t row = 0; row < width; ++row) {
    packer.pack_row(SliceMatrix::gate, row, gate + row * hidden);
    packer.pack_row(SliceMatrix::up, row, up + row * hidden);
  }
  for (int64_t row = 0; row < hidden; ++row) packer.pack_row(SliceMatrix::down, row, down + row * width);
}

}  // namespace lighter
