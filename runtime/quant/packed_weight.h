// A large weight as it lies packed in device memory (runtime/quant/packed_slice.h): a matrix, or a
// feed-forward network that serves every token. A plain view: whoever loaded the bytes owns them and keeps
// them in place.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/quant/packed_slice.h"

namespace lighter {

struct PackedWeight {
  SliceEncoding encoding = SliceEncoding::dense;  // int8 or int4 in a weight that is there
  // A matrix's shape. A feed-forward network maps the hidden size to itself: both are the hidden size.
  int64_t rows = 0;
  int64_t columns = 0;
  // A feed-forward network's: `slices` of slice_width columns each, one after the other. 0: a matrix.
  int64_t slices = 0;
  int64_t slice_width = 0;
  const std::byte* data = nullptr;  // on the device, at a multiple of 256 bytes

  bool is_ffn() const { return slices > 0; }
  // Of a feed-forward network.
  uint64_t slice_bytes() const { return packed_slice_bytes(encoding, columns, slice_width); }
  // Of a matrix.
  PackedMatrix matrix() const { return packed_matrix_layout(encoding, rows, columns); }

  uint64_t bytes() const {
    return is_ffn() ? static_cast<uint64_t>(slices) * slice_bytes()
                    : packed_matrix_bytes(encoding, rows, columns);
  }
};

}  // namespace lighter
