// A Hugging Face model folder as published: model.safetensors, or model.safetensors.index.json and the
// shards that it names. Tensors are found by name, wherever they lie, and read in pieces of any size.
// What the weights mean, config.json included, is not this layer's business.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "models/checkpoint/safetensors.h"
#include "runtime/dtype.h"

namespace lighter::models {

// Immutable once open; all const methods are thread-safe. Owns one open file per shard and the headers,
// and maps nothing into memory. Move-only.
class Checkpoint {
 public:
  // Reads and checks every shard's header and compares it with the index. CheckpointError if the folder or
  // a shard is missing, damaged or truncated, or if index and shards disagree. A tensor that the index
  // leaves out is read from the shard that has it.
  static Checkpoint open(const std::filesystem::path& dir);

  bool contains(std::string_view name) const;
  // CheckpointError with the nearest names if there is no such tensor.
  const TensorInfo& info(std::string_view name) const;
  // Every tensor, sorted.
  const std::vector<std::string>& names() const { return names_; }
  // Of all tensors, as they are stored.
  std::uint64_t total_bytes() const;

  // CheckpointError if the tensor is missing, has another shape, or has elements that read() cannot convert.
  void expect(std::string_view name, std::span<const std::int64_t> shape) const;
  // The same for a tensor of bytes, which read_bytes() reads.
  void expect_bytes(std::string_view name, std::span<const std::int64_t> shape) const;

  // Writes elements [first, first + count), in row-major order, to dst as dst_type, fp32 or bf16. Stored are
  // fp32, fp16 or bf16; rounding to bf16 is to nearest even. dst holds count elements and is aligned for
  // them. Uses at most kScratchBytes of memory, and none if nothing is to be converted.
  void read(std::string_view name, std::int64_t first, std::int64_t count, DType dst_type, void* dst) const;

  // Bytes [first, first + count) of a tensor of any type, as they are stored.
  void read_bytes(std::string_view name, std::uint64_t first, std::uint64_t count, void* dst) const;

  static constexpr std::size_t kScratchBytes = std::size_t{1} << 20;

 private:
  Checkpoint() = default;
  void open_files(const std::vector<std::string>& file_names);
  void collect_tensors();
  const TensorInfo* find(std::string_view name) const;
  void check_shape(const TensorInfo& tensor, std::span<const std::int64_t> shape) const;

  std::filesystem::path dir_;
  std::vector<SafetensorsFile> files_;
  std::vector<std::string> names_;   // sorted
  std::vector<TensorInfo> tensors_;  // tensors_[i] is called names_[i]
};

}  // namespace lighter::models
