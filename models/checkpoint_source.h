// Weights from a Hugging Face folder, as published or as `lighter quantize` writes them.
#pragma once

#include <filesystem>

#include "models/checkpoint/checkpoint.h"
#include "models/stored_formats.h"
#include "models/tensor_source.h"

namespace lighter::models {

class CheckpointSource : public TensorSource {
 public:
  // Checks that every tensor of the spec is there with its shape and that nothing is left over (but the
  // vision parts, which text does not use). slice_width divides the experts' FFN width. stored: what the
  // folder holds packed, in slices of this width; then it is read only in these formats.
  CheckpointSource(const std::filesystem::path& dir, const ModelSpec& spec, DType dtype, int64_t slice_width,
                   std::optional<StoredFormats> stored = std::nullopt);

  void read(const TensorPart& part, int64_t first, int64_t count, DType dtype, void* to) const override;
  void read_expert(ExpertId expert, std::span<std::byte* const> slices) const override;
  void read_packed_rows(const Weight& weight, SliceEncoding encoding, int64_t first, int64_t count,
                        const PackedRowsTarget& to) const override;
  void read_packed_slices(const Weight& gate_up, const Weight& down, const PackedWeight& form, int64_t first,
                          int64_t count, std::byte* to) const override;

  const Checkpoint& checkpoint() const { return checkpoint_; }

 private:
  void check_names(const std::filesystem::path& dir) const;
  bool experts_packed() const { return stored_ && stored_->experts != SliceEncoding::dense; }

  const ModelSpec spec_;
  const DType dtype_;
  const int64_t slice_width_;
  const std::optional<StoredFormats> stored_;
  std::vector<int> decoder_layer_;  // of each MoE layer
  Checkpoint checkpoint_;
};

}  // namespace lighter::models
