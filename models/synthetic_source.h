// Random weights of exact shapes, for benchmarks where no checkpoint is at hand. The same seed gives the same
// weights on every machine, in any order of reading. Quantized weights are drawn in their format
// (models/packed_synthesis.h): they are not the quantized form of the weights that the same seed gives
// unquantized.
#pragma once

#include <filesystem>

#include "models/tensor_source.h"

namespace lighter::models {

class SyntheticSource : public TensorSource {
 public:
  // experts: the format of the routed experts. Thread-safe.
  SyntheticSource(const ModelSpec& spec, DType dtype, SliceEncoding experts, int64_t slice_width,
                  uint64_t seed);

  void read(const TensorPart& part, int64_t first, int64_t count, DType dtype, void* to) const override;
  void read_expert(ExpertId expert, std::span<std::byte* const> slices) const override;
  void read_packed_rows(const Weight& weight, SliceEncoding encoding, int64_t first, int64_t count,
                        const PackedRowsTarget& to) const override;
  void read_packed_slices(const Weight& gate_up, const Weight& down, const PackedWeight& form, int64_t first,
                          int64_t count, std::byte* to) const override;

 private:
  uint64_t key_of(const TensorPart& part) const;

  const ModelSpec spec_;
  const DType dtype_;
  const SliceEncoding experts_;
  const int64_t slice_width_;
  const uint64_t seed_;
};

// The spec of a named preset (scout, llama-3.1-8b, mixtral-8x7b), or of a config.json.
ModelSpec synthetic_spec(const std::string& name_or_config);

}  // namespace lighter::models
