// Where weights come from: a checkpoint folder, or a generator of exact shapes.
#pragma once

#include "models/weights.h"
#include "runtime/dtype.h"
#include "runtime/moe/slice_source.h"
#include "runtime/quant/packed_weight.h"

namespace lighter::models {

// Where some rows of a packed matrix go.
struct PackedRowsTarget {
  std::byte* values = nullptr;
  uint16_t* scales = nullptr;
  uint16_t* minimums = nullptr;  // int4
};

// Thread-safe.
class TensorSource : public SliceSource {
 public:
  // Elements [first, first + count) of a part in row-major order, as dtype.
  virtual void read(const TensorPart& part, int64_t first, int64_t count, DType dtype, void* to) const = 0;

  // Rows [first, first + count) of a weight, its parts stacked, packed. Unless a source knows better, they
  // are read with read() and quantized, some rows at a time, by oneTBB's threads; each takes at most
  // packing_bytes().
  virtual void read_packed_rows(const Weight& weight, SliceEncoding encoding, int64_t first, int64_t count,
                                const PackedRowsTarget& to) const;
  // Slices [first, first + count) of a feed-forward network, one after the other.
  virtual void read_packed_slices(const Weight& gate_up, const Weight& down, const PackedWeight& form,
                                  int64_t first, int64_t count, std::byte* to) const;

  // Of a thread that quantizes.
  static constexpr uint64_t packing_bytes() { return uint64_t{256} << 10; }
};

}  // namespace lighter::models
