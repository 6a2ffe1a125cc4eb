#include "runtime/quant/packed_slice.h"

#include <string>

#include "runtime/error.h"

namespace lighter {
namespace {

// what: "slices need a hidden size", say.
void check(SliceEncoding encoding, std::string_view what, int64_t value, int64_t unit, int64_t most,
           const char* change) {
  const auto fail = [&](const std::string& rule) {
    throw ConfigError(std::string(encoding_name(encoding)) + " " + std::string(what) + " " + rule + ", not " +
                      std::to_string(value) + "; " + change);
  };
  if (value <= 0 || value % unit != 0) fail("that is a multiple of " + std::to_string(unit));
  if (value > most) fail("of at most " + std::to_string(most));
}

}  // namespace

PackedSliceLayout packed_slice_layout(SliceEncoding encoding, int64_t hidden, int64_t width) {
  if (encoding == SliceEncoding::dense) {
    throw ConfigError("dense slices have no packed layout; choose int8 or int4");
  }
  check(encoding, "slices need a hidden size", hidden, 128, kMaxPackedColumns,
        "keep this model's experts dense");
  check(encoding, "slices need a slice width", width, 256, kMaxPackedColumns,
        "choose another slice width, or keep these experts dense");

  PackedSliceLayout layout{encoding, hidden, width, {}, 0};
  layout.matrices[0] = layout.matrices[1] = {width, hidden, 0, 0, 0};
  layout.matrices[2] = {hidden, width, 0, 0, 0};
  const int64_t weights = hidden * width;  // of one matrix
  const uint64_t scale_bytes = static_cast<uint64_t>(weights / group_size(encoding)) * sizeof(uint16_t);
  for (PackedMatrix& matrix : layout.matrices) {
    matrix.values_at = layout.bytes;
    layout.bytes += static_cast<uint64_t>(value_bytes(encoding, weights));
  }
  for (PackedMatrix& matrix : layout.matrices) {
    matrix.scales_at = layout.bytes;
    layout.bytes += scale_bytes;
  }
  if (encoding == SliceEncoding::int4) {
    for (PackedMatrix& matrix : layout.matrices) {
      matrix.minimums_at = layout.bytes;
      layout.bytes += scale_bytes;
    }
  }
  return layout;
}

PackedMatrix packed_matrix_layout(SliceEncoding encoding, int64_t rows, int64_t columns) {
  if (encoding == SliceEncoding::dense) {
    throw ConfigError("dense matrices have no packed layout; choose int8 or int4");
  }
  constexpr const char* change = "keep this weight in the model's dtype";
  check(encoding, "matrices need a number of rows", rows, 16, int64_t{1} << 24, change);
  check(encoding, "matrices need a number of columns", columns, 128, kMaxPackedColumns, change);
  const uint64_t weights = static_cast<uint64_t>(rows) * static_cast<uint64_t>(columns);
  const auto values = static_cast<uint64_t>(value_bytes(encoding, rows * columns));
  PackedMatrix matrix{rows, columns, 0, values, 0};
  if (encoding == SliceEncoding::int4) {
    matrix.minimums_at = matrix.scales_at + weights / group_size(encoding) * sizeof(uint16_t);
  }
  return matrix;
}

uint64_t packed_matrix_bytes(SliceEncoding encoding, int64_t rows, int64_t columns) {
  const PackedMatrix matrix = packed_matrix_layout(encoding, rows, columns);
  const uint64_t last = encoding == SliceEncoding::int8 ? matrix.scales_at : matrix.minimums_at;
  return last + static_cast<uint64_t>(rows) * columns / group_size(encoding) * sizeof(uint16_t);
}

uint64_t packed_slice_bytes(SliceEncoding encoding, int64_t hidden, int64_t width) {
  return packed_slice_layout(encoding, hidden, width).bytes;
}

}  // namespace lighter
