// The model folders that `lighter quantize` writes: weights packed on disk as they are in memory
// (runtime/quant/packed_slice.h), so that loading only reads. What is not packed is stored as it was
// published, under its own name, and so are tokenizer and settings.
//
// config.json has, beside what the model's own has,
//   "quantization_config": {"quant_method": "lighter", "version": 1, "experts": "int4", "slice_width": 512,
//                           "shared": ["int4", …], "attention": ["int8", …], "head": "dtype"}
// shared and attention: by layer; experts are left out of a model without. slice_width: of the routed
// experts, and of packed networks where it divides their width. Packed weights are tensors of bytes (U8); L
// is a layer:
//   packed.L.qkv, packed.L.o, packed.head    [bytes]                       a matrix of its own
//   packed.L.shared, packed.L.ffn            [slices, bytes of a slice]    a network that serves every token
//   packed.L.experts                         [experts, slices, bytes of a slice]
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "models/weight_formats.h"

namespace lighter::models {

struct StoredFormats {
  WeightFormats weights;  // of all but the routed experts; its dtype says nothing
  SliceEncoding experts = SliceEncoding::dense;
};

// None: a folder as published. Throws CheckpointError for a damaged entry.
std::optional<StoredFormats> read_stored_formats(const std::filesystem::path& config_json,
                                                 const ModelSpec& spec);
// The entry "quantization_config".
nlohmann::json stored_formats_entry(const StoredFormats& formats, const ModelSpec& spec);

// A packed weight's tensor. Of a network in the role of its gate and up rows.
std::string packed_name(const Weight& weight);
std::string packed_experts_name(int layer);  // decoder layer

struct FolderTensor {
  std::string name;
  std::vector<int64_t> shape;
  int layer = -1;       // decoder layer; -1: of none
  bool packed = false;  // bytes; else numbers, as published
};
// What a folder holds, in the order of list_weights(), then each layer's experts. formats: null for one as
// published.
std::vector<FolderTensor> folder_tensors(const ModelSpec& spec, const StoredFormats* formats);

}  // namespace lighter::models
