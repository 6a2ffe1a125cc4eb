// What a YAML file can say, as plain structs. They own their data and hold no invariants of their own:
// load_config() checks everything that can be checked without opening the model.
// config_keys.cpp describes each key (name, accepted values, default, meaning) once, for parser and schema.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "runtime/config/layer_formats.h"
#include "runtime/config/selector.h"
#include "runtime/dtype.h"
#include "runtime/quant/packed_slice.h"

namespace lighter {

// Exactly one of path and synthetic is set.
struct ModelConfig {
  std::filesystem::path path;  // a Hugging Face checkpoint folder
  std::string synthetic;       // "scout", "llama-3.1-8b", "mixtral-8x7b", or the path of a config.json
  DType dtype = DType::bf16;   // bf16 or fp32
  // What the formats below are where they are not set themselves. dense: in dtype.
  SliceEncoding format = SliceEncoding::dense;
  SliceEncoding experts = SliceEncoding::dense;  // of the routed experts
  LayerFormats shared;                           // of shared experts and dense FFN layers
  LayerFormats attention;                        // of q, k, v and o
  SliceEncoding head = SliceEncoding::dense;
  bool formats_given = false;  // whether the configuration says any of them
  std::optional<int> layers;   // synthetic only: keep the first so many layers
  uint64_t seed = 0;           // synthetic only: of the weights

  bool is_synthetic() const { return !synthetic.empty(); }
};

struct DeviceConfig {
  enum class Kind { cpu, cuda };
  Kind kind = Kind::cuda;
  int index = 0;  // always 0 for cpu
};

struct MemoryConfig {
  uint64_t gpu_budget_bytes = 0;   // hard; on device cpu it bounds the device arena
  uint64_t host_budget_bytes = 0;  // hard
  int64_t context = 8192;          // tokens
  int64_t prefill_chunk = 0;       // tokens; 0 = auto
  int64_t kv_block = 256;          // tokens; divides 8192
  int sequences = 1;               // decoded together; each may grow to the context
};

struct ResidentAuto {};
// What share of each layer's expert slices starts resident: as much as fits, one ratio for all layers, or
// one per layer of the model (dense layers included; theirs is ignored). Ratios lie in [0, 1].
using Resident = std::variant<ResidentAuto, double, std::vector<double>>;

struct PrefetchConfig {
  bool enabled = true;
  int depth = 1;  // layers ahead, 1 to 8
};

// Who chooses the experts. Anything but the router is for synthetic weights.
struct RoutingConfig {
  enum class Schedule { router, uniform, zipf };
  Schedule schedule = Schedule::router;
  double zipf_s = 0;  // exponent, only for zipf: weight of the expert at rank r is 1 / (r + 1)^s
  uint64_t seed = 0;
};

struct OffloadConfig {
  enum class Policy { static_, lru, lfu };
  enum class Miss { automatic, fetch, zero_copy, cpu, split };
  Resident resident;
  Policy policy = Policy::lru;
  Miss miss = Miss::automatic;
  std::vector<PinSelector> pin;  // experts that are never evicted
  PrefetchConfig prefetch;
  int64_t slice_width = 0;  // FFN columns in a slice; 0 = auto
  bool near_pages = true;
  RoutingConfig routing;
};

// As in YAML.
const char* miss_name(OffloadConfig::Miss miss);

struct CpuConfig {
  int threads = 0;  // 0 = auto
};

// How a token is decoded: as one CUDA graph, or one operation after the other.
enum class DecodeMode { automatic, graph, eager };

struct GenerateConfig {
  int64_t max_tokens = 256;
  double temperature = 0;  // 0 = greedy
  std::optional<int> top_k;
  std::optional<double> top_p, min_p;
  std::optional<uint64_t> seed;
  std::vector<std::string> stop;
  bool ignore_eos = false;
};

struct Config {
  ModelConfig model;
  DeviceConfig device;
  DecodeMode decode = DecodeMode::automatic;
  MemoryConfig memory;
  OffloadConfig offload;
  CpuConfig cpu;
  GenerateConfig generate;
};

// Reads a YAML file, then applies overrides ("key.path=value", the value in YAML) in order. A key whose value
// is null counts as not set, so "key.path=" takes back what the file says. A relative model.path, and a
// model.synthetic that is a path, is relative to the file's folder; in an override, to the working directory.
// Throws ConfigError, "file:line:column: what is wrong" (both from 1) or "--set key=value: what is wrong".
Config load_config(const std::filesystem::path& file, std::span<const std::string> overrides = {});

}  // namespace lighter
