// Quantizes a model with what a text does in it: layer by layer, each matrix is rounded so that its output on
// that text comes nearest to what it is in the model as it is (models/gptq.h), though its input is what the
// rounded ones before it make of the text. So the text goes through both. int8 is to the nearest, whatever
// the text. Beside the dense weights it holds the residual stream, one layer's inputs and outputs of all
// tokens, one expert, and some fp64 squares of the widest matrix's columns. Weights are rounded from what
// they are in dtype.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "models/attention.h"
#include "models/gptq.h"
#include "models/packed_folder.h"
#include "runtime/progress.h"

namespace lighter::models {

class ModelQuantizer {
 public:
  // source: dense, each expert a single slice. weights: of that source, all dense; they become what rounding
  // leaves of them. kv: of one sequence. expert_room: expert_bytes() of page-locked or other host memory. All
  // references must outlive it.
  ModelQuantizer(const ModelSpec& spec, const CheckpointSource& source, LoadedWeights& weights, KvCache& kv,
                 Device& device, DType dtype, const StoredFormats& formats, std::span<std::byte> expert_room);

  // texts: token ids, each a sequence no longer than the context; none are needed without int4, and then
  // nothing is computed but the rounding. chunk: tokens of a step. Progress in bytes, of dtype where weights
  // are rounded. Throws what may go wrong in reading, writing and computing.
  void run(const std::vector<std::vector<int64_t>>& texts, int64_t chunk, PackedFolderWriter& writer,
           const Progress& progress);

  // Of the routed experts, those that fewer tokens chose than the hidden size is wide: their inputs do not
  // span it.
  int experts_short_of_text() const { return experts_short_of_text_; }

  static uint64_t expert_bytes(const ModelSpec& spec, DType dtype);
  // Of libtorch's temporaries on the device, beside those of a step; and of everything on the host.
  static uint64_t device_bytes(const ModelSpec& spec, DType dtype, int64_t tokens);
  static uint64_t host_bytes(const ModelSpec& spec);

 private:
  // The same rows of the text, in the model as it is and in the one that is rounded so far.
  struct Both {
    at::Tensor exact, rounded;
  };
  // A feed-forward network's matrices on the device, and how it is to be rounded.
  struct Ffn {
    at::Tensor gate_up, down;
    SliceEncoding encoding = SliceEncoding::dense;
    int64_t slice_width = 0;
    std::string name;
  };

  at::Tensor embed_texts(const std::vector<std::vector<int64_t>>& texts) const;
  at::Tensor attend(int layer, const at::Tensor& normed, const std::vector<std::vector<int64_t>>& texts,
                    int64_t chunk);
  Both moe(int layer, const Both& x);
  Both dense(const Weight& gate_up, const Both& x);
  // Rounds what is to be rounded, hands it to `put`, and returns the network's output for x.
  template <typename Put>
  at::Tensor through_ffn(const Ffn& ffn, const Both& x, const Put& put);
  void quantize(const Weight& weight, const Both& inputs);
  const Weight& find(WeightRole role, int layer) const;
  void done(uint64_t bytes);

  const ModelSpec& spec_;
  const CheckpointSource& source_;
  LoadedWeights& weights_;
  KvCache& kv_;
  Device& device_;
  const DType dtype_;
  const StoredFormats& formats_;
  const std::span<std::byte> expert_room_;
  const std::vector<Weight> all_;
  Attention attention_;
  PackedFolderWriter* writer_ = nullptr;
  const Progress* progress_ = nullptr;
  uint64_t done_bytes_ = 0;
  uint64_t total_bytes_ = 0;
  int experts_short_of_text_ = 0;
};

}  // namespace lighter::models
