// Recorded routing: which experts each token took in each MoE layer, what the router said, and what the
// predictor had expected. Written by `lighter trace`, read by `lighter replay`.
//
// The file, version 1, little-endian:
//
//   "LTRTRACE"           8 bytes
//   version              u32
//   length of the header u32
//   header               JSON: model, dtype, layers (the decoder layer of each MoE layer), experts,
//                        experts_per_token, slices (of an expert), slice_bytes, depths
//   a record per token:
//     position           u32; one more than the last record's, or 0 where a sequence begins
//     for each MoE layer:
//       experts          u16 × experts_per_token, best first
//       router logits    fp16 × experts
//       for each depth:  fp16 × experts, what was expected of this layer that many decoder layers earlier;
//                        not there when that layer is no MoE layer or before the first
//   "LTR END\0"          8 bytes
//   tokens               u64
//   checksum             u64, FNV-1a of the records
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "runtime/moe/expert_id.h"

namespace lighter::offload {

struct TraceHeader {
  std::string model;
  std::string dtype;
  std::vector<int> layers;
  int experts = 0;
  int experts_per_token = 0;
  int slices = 0;
  uint64_t slice_bytes = 0;
  std::vector<int> depths;  // ascending

  ExpertGrid grid() const { return {static_cast<int>(layers.size()), experts, slices, slice_bytes}; }
  bool operator==(const TraceHeader&) const = default;
};

// Where in a record's 16-bit values things stand.
class TraceLayout {
 public:
  explicit TraceLayout(const TraceHeader& header);

  size_t values() const { return values_; }  // of a token
  size_t experts(int layer) const { return layers_[layer].experts; }
  size_t router(int layer) const { return layers_[layer].router; }
  // Nothing for a depth that the header does not list, and where nobody guesses.
  std::optional<size_t> guess(int layer, int depth) const;

 private:
  struct Layer {
    size_t experts = 0;
    size_t router = 0;
    std::vector<std::pair<int, size_t>> guesses;  // depth, place
  };

  std::vector<Layer> layers_;
  size_t values_ = 0;
};

// A trace in memory. Immutable; thread-safe.
class Trace {
 public:
  // Throws CheckpointError for a file that is missing, cut off, damaged, or of another version.
  static Trace read(const std::filesystem::path& file);

  // values: tokens × layout.values(). Throws CheckpointError, naming `source`, for what no run records.
  Trace(TraceHeader header, std::vector<uint32_t> positions, std::vector<uint16_t> values,
        const std::string& source = "trace");

  const TraceHeader& header() const { return header_; }
  size_t tokens() const { return positions_.size(); }
  size_t sequences() const;
  uint32_t position(size_t token) const { return positions_[token]; }
  // Best first.
  std::span<const uint16_t> experts(size_t token, int layer) const {
    return at(token, layout_.experts(layer), header_.experts_per_token);
  }
  // fp16 bit patterns, one for each expert. A guess that was not made is empty.
  std::span<const uint16_t> router_logits(size_t token, int layer) const {
    return at(token, layout_.router(layer), header_.experts);
  }
  std::span<const uint16_t> guess_logits(size_t token, int layer, int depth) const;

 private:
  std::span<const uint16_t> at(size_t token, size_t place, int count) const {
    return {values_.data() + token * layout_.values() + place, static_cast<size_t>(count)};
  }
  void check(const std::string& source) const;

  TraceHeader header_;
  TraceLayout layout_;
  std::vector<uint32_t> positions_;
  std::vector<uint16_t> values_;
};

// Writes beside the file and renames at finish(), so that there is never half a trace. Not thread-safe.
class TraceWriter {
 public:
  // Throws ConfigError when the file cannot be made.
  TraceWriter(std::filesystem::path file, const TraceHeader& header);
  // Without finish(), nothing stays.
  ~TraceWriter();
  TraceWriter(const TraceWriter&) = delete;
  TraceWriter& operator=(const TraceWriter&) = delete;

  const TraceLayout& layout() const { return layout_; }
  // values: layout().values() for each position. Throws ConfigError when the disk is full.
  void write(std::span<const uint32_t> positions, std::span<const uint16_t> values);
  void finish();
  uint64_t tokens() const { return tokens_; }
  uint64_t bytes() const { return bytes_; }

 private:
  void put(const void* data, size_t bytes);

  const std::filesystem::path file_;
  const std::filesystem::path part_;
  const TraceLayout layout_;
  std::ofstream out_;
  uint64_t tokens_ = 0;
  uint64_t bytes_ = 0;
  uint64_t checksum_;
  bool finished_ = false;
};

}  // namespace lighter::offload
