// Writes the folders that models/stored_formats.h describes, a layer at a time, so that no more than a
// layer's parts are in memory.
//
// The folder has its final name only once finish() has returned; until then it is DIR.partial, which the
// destructor removes. Not thread-safe. Throws CheckpointError where a file cannot be written, ConfigError
// where DIR is there already.
#pragma once

#include <cstddef>
#include <filesystem>
#include <functional>
#include <map>
#include <optional>
#include <string>

#include "models/checkpoint/safetensors_writer.h"
#include "models/checkpoint_source.h"

namespace lighter::models {

class PackedFolderWriter {
 public:
  // from: the folder as published, and its weights; they and the spec must outlive it.
  PackedFolderWriter(const std::filesystem::path& dir, std::filesystem::path from,
                     const CheckpointSource& source, const ModelSpec& spec, StoredFormats formats);
  ~PackedFolderWriter();

  // A decoder layer's file; -1: of what belongs to no layer. Then its packed weights in the order of
  // list_weights(), then its experts, an expert's slices at a time; then the next layer's.
  void begin(int layer);
  void put(const Weight& weight, const std::byte* bytes, uint64_t count);
  void put_expert(const std::byte* slices, uint64_t count);
  // The layer's other weights, as they are stored; copied: told how many bytes more are, now and then.
  void end(const std::function<void(uint64_t bytes)>& copied);
  // Index, settings and tokenizer. Every layer was put.
  void finish();

  uint64_t written_bytes() const { return written_bytes_; }
  // Of all weights that are stored as they were.
  uint64_t copied_bytes() const;

 private:
  const std::filesystem::path dir_, partial_, from_;
  const CheckpointSource& source_;
  const ModelSpec& spec_;
  const StoredFormats formats_;
  const int files_;
  int file_ = 0;  // the number of the one that is open
  int layer_ = -1;
  std::optional<SafetensorsWriter> writer_;
  std::vector<std::string> copies_;  // of the open file
  std::map<std::string, std::string> weight_map_;
  uint64_t written_bytes_ = 0;
  bool finished_ = false;
};

}  // namespace lighter::models
