#include "runtime/quant/packed_slice.h"

#include <string>

#include "runtime/error.h"

namespace lighter {
namespace {

void check(SliceEncoding encoding, std::string_view what, int64_t value, int64_t unit, const char* change) {
  const auto fail = [&](const std::string& rule) {
    throw ConfigError(std::string(encoding_name(encoding)) + " slices need a " + std::string(what) + " " +
                      rule + ", not " + std::to_string(value) + "; " + change);
  };
  if (value <= 0 || value % unit != 0) fail("that is a multiple of " + std::to_string(unit));
  if (value > kMaxPackedColumns) fail("of at most " + std::to_string(kMaxPackedColumns));
}

}  // namespace

PackedSliceLayout packed_slice_layout(SliceEncoding encoding, int64_t hidden, int64_t width) {
  if (encoding == SliceEncoding::dense) {
    throw ConfigError("dense slices have no packed layout; choose int8 or int4");
  }
  check(encoding, "hidden size", hidden, 128, "keep this model's experts dense");
  check(encoding, "slice width", width, 256, "choose another slice width, or keep these experts dense");

  PackedSliceLayout layout{encoding, hidden, width, {}, 0};
  layout.matrices[0] = layout.matrices[1] = {width, hidden, 0, 0, 0};
  layout.matrices[2] = {hidden, width, 0, 0, 0};
  const uint64_t weights = static_cast<uint64_t>(hidden) * static_cast<uint64_t>(width);  // of one matrix
  const uint64_t value_bytes = encoding == SliceEncoding::int8 ? weights : weights / 2;
  const uint64_t scale_bytes = weights / group_size(encoding) * sizeof(uint16_t);
  for (PackedMatrix& matrix : layout.matrices) {
    matrix.values_at = layout.bytes;
    layout.bytes += value_bytes;
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

uint64_t packed_slice_bytes(SliceEncoding encoding, int64_t hidden, int64_t width) {
  return packed_slice_layout(encoding, hidden, width).bytes;
}

}  // namespace lighter
