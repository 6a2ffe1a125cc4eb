// Experts quantized while they are read: an expert at a time goes through a scratch in the model's dtype, so
// that no unquantized copy of the model ever exists.
#pragma once

#include <tbb/task_arena.h>

#include <memory>
#include <mutex>
#include <vector>

#include "models/tensor_source.h"
#include "runtime/quant/packed_slice.h"

namespace lighter::models {

class QuantizingSource : public TensorSource {
 public:
  // source reads dense experts with the same slice width. threads: that quantize.
  QuantizingSource(std::unique_ptr<TensorSource> source, const ModelSpec& spec, DType dtype,
                   SliceEncoding encoding, int64_t slice_width, int threads);

  void read(const TensorPart& part, int64_t first, int64_t count, DType dtype, void* to) const override {
    source_->read(part, first, count, dtype, to);
  }
  void read_expert(ExpertId expert, std::span<std::byte* const> slices) const override;

  // Of every call that is under way.
  static uint64_t scratch_bytes(const ModelSpec& spec, DType dtype);

 private:
  std::vector<std::byte> take_scratch() const;
  void quantize(const std::byte* dense, std::byte* packed) const;

  std::unique_ptr<TensorSource> source_;
  const ModelSpec spec_;
  const DType dtype_;
  const SliceEncoding encoding_;
  const int64_t slice_width_;
  mutable tbb::task_arena arena_;
  mutable std::mutex mutex_;
  mutable std::vector<std::vector<std::byte>> free_scratch_;  // as many as calls were ever under way
};

}  // namespace lighter::models
