// Weights quantized while they are read: a few rows in fp32 for each thread.
#include <tbb/parallel_for.h>

#include <algorithm>

#include "models/tensor_source.h"
#include "runtime/error.h"
#include "runtime/quant/quantize.h"

namespace lighter::models {
namespace {

// Calls body(first, end) for blocks of [0, rows) whose floats, `columns` of them a row, fit into
// packing_bytes().
template <typename Body>
void for_row_blocks(int64_t rows, int64_t columns, const Body& body) {
  const auto limit = static_cast<int64_t>(TensorSource::packing_bytes() / sizeof(float));
  const int64_t step = std::max<int64_t>(1, limit / columns);
  tbb::parallel_for(int64_t{0}, (rows + step - 1) / step,
                    [&](int64_t block) { body(block * step, std::min(rows, (block + 1) * step)); });
}

// The part that holds a row of the stacked parts, and the row in it.
std::pair<const TensorPart*, int64_t> locate(const Weight& weight, int64_t row) {
  for (const TensorPart& part : weight.parts) {
    if (row < part.rows) return {&part, row};
    row -= part.rows;
  }
  throw CheckpointError("row beyond the end of " + weight.parts.front().name);
}

void check(int64_t bad_group, const TensorPart& part, int64_t row, SliceEncoding encoding) {
  if (bad_group < 0) return;
  throw CheckpointError(part.name + ", row " + std::to_string(row) + ", group " + std::to_string(bad_group) +
                        " of columns: a NaN, an infinity, or a magnitude above 65504 cannot be stored as " +
                        std::string(encoding_name(encoding)) +
                        "; the checkpoint is damaged, or this weight must stay in the model's dtype");
}

}  // namespace

void TensorSource::read_packed_rows(const Weight& weight, SliceEncoding encoding, int64_t first,
                                    int64_t count, const PackedRowsTarget& to) const {
  const int64_t columns = weight.parts.front().columns;
  const int64_t groups = columns / group_size(encoding);
  const int64_t row_bytes = value_bytes(encoding, columns);
  for_row_blocks(count, columns, [&](int64_t begin, int64_t end) {
    std::vector<float> values((end - begin) * columns);
    for (int64_t row = begin; row < end;) {
      const auto [part, in_part] = locate(weight, first + row);
      const int64_t rows = std::min(end - row, part->rows - in_part);
      read(*part, in_part * columns, rows * columns, DType::fp32, values.data());
      for (int64_t i = 0; i < rows; ++i, ++row) {
        const float* from = values.data() + i * columns;
        std::byte* q = to.values + row * row_bytes;
        uint16_t* scales = to.scales + row * groups;
        const int64_t bad = encoding == SliceEncoding::int8
                                ? quantize_int8(from, groups, reinterpret_cast<int8_t*>(q), scales)
                                : quantize_int4(from, groups, reinterpret_cast<uint8_t*>(q), scales,
                                                to.minimums + row * groups);
        check(bad, *part, in_part + i, encoding);
      }
    }
  });
}

void TensorSource::read_packed_slices(const Weight& gate_up, const Weight& down, const PackedWeight& form,
                                      int64_t first, int64_t count, std::byte* to) const {
  const int64_t hidden = form.columns;
  const int64_t width = form.slice_width;
  std::vector<SlicePacker> packers;
  for (int64_t i = 0; i < count; ++i) {
    packers.emplace_back(form.encoding, hidden, width, to + i * static_cast<int64_t>(form.slice_bytes()));
  }
  for (const SliceMatrix matrix : {SliceMatrix::gate, SliceMatrix::up}) {
    const TensorPart& part = gate_up.parts[matrix == SliceMatrix::gate ? 0 : 1];
    for_row_blocks(count * width, hidden, [&](int64_t begin, int64_t end) {
      std::vector<float> values((end - begin) * hidden);
      read(part, (first * width + begin) * hidden, (end - begin) * hidden, DType::fp32, values.data());
      for (int64_t row = begin; row < end; ++row) {
        packers[row / width].pack_row(matrix, row % width, values.data() + (row - begin) * hidden);
      }
    });
  }
  // Of each row of down the columns of these slices.
  const TensorPart& part = down.parts.front();
  for_row_blocks(hidden, count * width, [&](int64_t begin, int64_t end) {
    std::vector<float> values(count * width);
    for (int64_t row = begin; row < end; ++row) {
      read(part, row * part.columns + first * width, count * width, DType::fp32, values.data());
      for (int64_t i = 0; i < count; ++i) {
        packers[i].pack_row(SliceMatrix::down, row, values.data() + i * width);
      }
    }
  });
}

}  // namespace lighter::models
