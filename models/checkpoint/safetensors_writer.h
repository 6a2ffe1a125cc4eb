// Writes model folders in the published format: safetensors files and the index over several of them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "models/checkpoint/stored_type.h"

namespace lighter::models {

// Streams one safetensors file: declare every tensor, then append their bytes in the declared order, in
// pieces of any size, then finish. Holds no tensor in memory. The file has its final name only once
// finish() has returned; until then it is `<path>.partial`, which the destructor removes.
// Not thread-safe. CheckpointError on a call out of order, a wrong size, or a failed write.
//
//   Declaring --append--> Appending --finish--> Finished        (finish needs every byte)
class SafetensorsWriter {
 public:
  explicit SafetensorsWriter(std::filesystem::path path);
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;
  ~SafetensorsWriter();

  // Readers view tensors in place, so each must start at a multiple of its element's size: where types are
  // mixed, declare the wider ones first.
  void declare(std::string name, StoredType type, std::vector<std::int64_t> shape);
  // The next `count` bytes of the tensor, which must be the first that is not complete.
  void append(std::string_view name, const void* bytes, std::uint64_t count);
  void finish();

  // Bytes of all tensors declared so far, header not counted.
  std::uint64_t declared_bytes() const { return declared_bytes_; }

 private:
  struct Declared {
    std::string name;
    StoredType type;
    std::vector<std::int64_t> shape;
    std::uint64_t begin;
    std::uint64_t end;
  };

  void write_header();
  void skip_complete();
  void write(const void* bytes, std::uint64_t count);

  std::filesystem::path path_;
  std::filesystem::path partial_;
  std::ofstream out_;
  std::vector<Declared> tensors_;
  std::uint64_t declared_bytes_ = 0;
  std::uint64_t appended_bytes_ = 0;
  std::size_t current_ = 0;  // the first tensor that is not complete
  bool header_written_ = false;
  bool finished_ = false;
};

// Writes dir/model.safetensors.index.json. weight_map: tensor name -> name of its file in dir.
// tensor_bytes: the bytes of all tensors.
void write_safetensors_index(const std::filesystem::path& dir,
                             const std::map<std::string, std::string>& weight_map,
                             std::uint64_t tensor_bytes);

}  // namespace lighter::models
