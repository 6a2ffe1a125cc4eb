// Weights from a Hugging Face folder.
#pragma once

#include <filesystem>

#include "models/checkpoint/checkpoint.h"
#include "models/tensor_source.h"

namespace lighter::models {

class CheckpointSource : public TensorSource {
 public:
  // Checks that every tensor of the spec is there with its shape and that nothing is left over (but the
  // vision parts, which text does not use). slice_width divides the experts' FFN width.
  CheckpointSource(const std::filesystem::path& dir, const ModelSpec& spec, DType dtype, int64_t slice_width);

  void read(const TensorPart& part, int64_t first, int64_t count, DType dtype, void* to) const override;
  void read_expert(ExpertId expert, std::span<std::byte* const> slices) const override;

 private:
  void check_names(const std::filesystem::path& dir) const;

  const ModelSpec spec_;
  const DType dtype_;
  const int64_t slice_width_;
  std::vector<int> decoder_layer_;  // of each MoE layer
  Checkpoint checkpoint_;
};

}  // namespace lighter::models
