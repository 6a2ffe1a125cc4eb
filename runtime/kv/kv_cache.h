// Keys and values of all layers in blocks, allocated once. Two groups of layers with a block table each:
// those that attend to everything, and those that attend within chunks. Not thread-safe.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <memory>
#include <vector>

#include "runtime/device/device.h"
#include "runtime/dtype.h"
#include "runtime/engine/step.h"
#include "runtime/kv/block_table.h"

namespace lighter {

struct KvShape {
  std::vector<bool> chunked;  // by layer
  int64_t chunk = 0;          // positions in a chunk
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t block = 256;  // wanted; a smaller one is used where it does not divide chunk
  int64_t context = 0;  // positions a sequence may reach
  int sequences = 1;
  DType dtype = DType::bf16;

  int64_t usable_block() const;
  // In a step of a sequence that has reached this position: a chunk's keys are overwritten by the next one's,
  // so a step ends with the chunk.
  int64_t max_tokens_from(int64_t position) const;
  bool any_chunked() const;
  uint64_t bytes() const;
};

class KvCache {
 public:
  // What one sequence of a step reads, for one group of layers.
  struct Reads {
    at::Tensor rows;             // [keys] on the device
    int64_t first_position = 0;  // of the first key
    int64_t keys = 0;
  };
  // A step's view of the cache, made once and used by every layer.
  struct StepIndex {
    struct Group {
      at::Tensor writes;         // [tokens] rows, on the device
      std::vector<Reads> reads;  // by sequence of the step; empty for a batch
      // A batch: several sequences of one token each, read together. Rows past a sequence's keys are any.
      at::Tensor batch_rows;  // [sequences · keys] on the device
      at::Tensor
          batch_hidden;  // [sequences, keys] bool on the device: no key of the sequence; undefined: none
      int64_t keys = 0;  // the most that one has
    };
    std::array<Group, 2> groups;  // [0]: everything, [1]: chunked
  };

  // Throws CapacityError.
  KvCache(Device& device, const KvShape& shape);

  // Reserves blocks for the step's positions. No sequence's tokens may cross a chunk's end.
  StepIndex index(const Step& step);
  bool chunked(int layer) const { return shape_.chunked[layer]; }

  // keys, values: [tokens, kv_heads, head_dim]
  void write(int layer, const StepIndex& index, const at::Tensor& keys, const at::Tensor& values);
  // [keys, kv_heads, head_dim]
  at::Tensor keys(int layer, const Reads& reads) const { return keys_[layer].index_select(0, reads.rows); }
  at::Tensor values(int layer, const Reads& reads) const {
    return values_[layer].index_select(0, reads.rows);
  }
  // [sequences · keys, kv_heads, head_dim] of a batch
  at::Tensor batch_keys(int layer, const StepIndex& index) const {
    return keys_[layer].index_select(0, index.groups[chunked(layer)].batch_rows);
  }
  at::Tensor batch_values(int layer, const StepIndex& index) const {
    return values_[layer].index_select(0, index.groups[chunked(layer)].batch_rows);
  }

  // For kernels that find the rows themselves: reserves the position's blocks, and gives a group's table.
  void reserve(int sequence, int64_t position);
  const BlockTable& table(bool chunked) const { return tables_[chunked]; }
  void* key_data(int layer) const { return keys_[layer].data_ptr(); }
  void* value_data(int layer) const { return values_[layer].data_ptr(); }

  void release(int sequence);
  const KvShape& shape() const { return shape_; }

 private:
  void index_batch(const Step& step, const BlockTable& table, StepIndex::Group& group) const;

  Device& device_;
  const KvShape shape_;
  std::array<BlockTable, 2> tables_;
  Buffer memory_;
  std::vector<at::Tensor> keys_;  // by layer: [rows, kv_heads, head_dim]
  std::vector<at::Tensor> values_;
};

}  // namespace lighter
