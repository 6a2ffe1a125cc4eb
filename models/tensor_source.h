// Where weights come from: a checkpoint folder, or a generator of exact shapes.
#pragma once

#include "models/weights.h"
#include "runtime/moe/slice_source.h"

namespace lighter::models {

class TensorSource : public SliceSource {
 public:
  // Elements [first, first + count) of a part in row-major order, as dtype. Thread-safe.
  virtual void read(const TensorPart& part, int64_t first, int64_t count, DType dtype, void* to) const = 0;
};

}  // namespace lighter::models
