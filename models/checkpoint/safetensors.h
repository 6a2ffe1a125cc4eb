// One safetensors file: 8 bytes header length N (little-endian), N bytes JSON header that names every
// tensor's type, shape and place, then the tensors' bytes, row-major and little-endian.
// The format: https://github.com/huggingface/safetensors#format
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "models/checkpoint/read_file.h"
#include "models/checkpoint/stored_type.h"

namespace lighter::models {

struct TensorInfo {
  std::string name;
  StoredType type = StoredType::other;
  std::vector<std::int64_t> shape;
  std::uint64_t bytes = 0;    // as stored
  std::int64_t elements = 0;  // product of shape

  // Where the bytes are; the readers' own business.
  std::string format_type;        // the type as the file calls it
  std::size_t file = 0;           // index of the shard within its checkpoint
  std::uint64_t file_offset = 0;  // from the start of the file
};

// "[16, 5120]"; "[]" for a scalar.
std::string shape_text(std::span<const std::int64_t> shape);

// Opening reads the header and checks all of it against the file's real size: what is listed can be read.
// Immutable once open; const methods are thread-safe. Owns the open file.
class SafetensorsFile {
 public:
  // CheckpointError, with the numbers, if the file cannot be opened, is truncated, or breaks the format:
  // overlaps, gaps, bytes past the last tensor, sizes that do not match the shape, repeated names.
  explicit SafetensorsFile(std::filesystem::path path);

  const std::filesystem::path& path() const { return file_.path(); }
  // In the order in which they lie in the file.
  const std::vector<TensorInfo>& tensors() const { return tensors_; }

  // Copies bytes [first, first + count) of a tensor of this file, as they are stored, to dst.
  // CheckpointError if the range is not within the tensor or the read fails.
  void read_bytes(const TensorInfo& tensor, std::uint64_t first, std::uint64_t count, void* dst) const;

 private:
  ReadFile file_;
  std::vector<TensorInfo> tensors_;
};

}  // namespace lighter::models
