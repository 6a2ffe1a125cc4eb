// How fast a model will be on a machine: from the bytes and operations of a step and the machine's
// calibration. Pure; thread-safe.
//
// Decoding. A matrix that `tokens` tokens use takes
//   few(bytes, tokens)  = max(bytes / kernels[format], arithmetic)           for 2 to 16 tokens; without
//                         arithmetic for one
//   many(bytes, tokens) = unpack + max(2 · weights / device_read, arithmetic)   beyond
//   arithmetic          = 2 · weights · tokens / tensor
//   unpack              = (bytes + 2 · weights) / device_read, for packed formats
// and a step
//   step    = outside + max(inside, missed) + fixed
//   outside = attention's matrices, routers, dense layers, head; keys and values / kv_read
//   inside  = shared experts, and the resident share of the distinct experts that the batch chooses
//   missed  = the other share of their bytes, by the mode:
//     fetch      bytes / link, or 0.95 of it in a graph
//     zero_copy  bytes / zero_copy
//     cpu        bytes / cpu_experts[format], and a third of what four tokens take longer for each further
//     one split      bytes / (cpu + device), the rates of both beside each other, or the CPU's for so many
//     tokens
//                if lower; both end together. In batches copies run ahead of the layers, the CPU waits while
//                outside and the handing over of tokens last, launches pass meanwhile (the longest counts),
//                and an expert with more than four tokens takes the CPU 1.4 times as long
//   fixed   = costs of the graph, or of eager decoding, a layer, an MoE layer, a layer with misses and a step
// The sums are over layers, since all have the same share resident.
//
// Prefill. The chunks of a prompt, each max(compute, missed bytes / rate, fixed) and a third of what is
// shorter, compute or copies: copies run ahead of the layers, as far as there are slots, and launches ahead
// of the GPU. rate: the link's; with few tokens, the mode's as above. compute: few() or
// many() of everything, and 4 · heads · head_dim operations for each query and key in each layer.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "offload/bound.h"
#include "offload/calibration.h"

namespace lighter::offload {

enum class MissMode { fetch, zero_copy, cpu, split };
const char* miss_mode_name(MissMode mode);
MissWay way_of(MissMode mode);

// What a model is to the one who asks how fast it is. Bytes as stored, of all layers together.
struct SpeedShape {
  int layers = 0, moe_layers = 0;
  ByFormat<uint64_t> outside;  // attention, norms, routers, dense layers
  ByFormat<uint64_t> shared;
  ByFormat<uint64_t> head;
  SliceEncoding expert_format = SliceEncoding::dense;
  uint64_t expert = 0;  // one routed expert
  int experts = 0, experts_per_token = 0;
  uint64_t kv_per_token = 0;
  double operations_per_key = 0;  // of attention: 4 · heads · head_dim · layers
  int dense_weight_bytes = 2;
};
StepBytes step_bytes(const SpeedShape& shape);

struct DecodeLoad {
  double resident_share = 1;  // or the hit rate, where it is higher
  int batch = 1;              // sequences
  double context = 0;         // keys that each reads
  bool graph = true;
};

// Seconds of one step: parts of what is beside the experts, and of what goes on at the same time.
struct DecodeSpeed {
  MissMode mode = MissMode::fetch;
  double tokens_per_s = 0;
  double step_s = 0;
  double outside_s = 0;
  double experts_s = 0;  // resident and shared, on the device
  double cpu_s = 0;      // missed bytes that the CPU computes
  double link_s = 0;     // missed bytes that go to the device
  double fixed_s = 0;
};

// Nothing where the machine or the format cannot do it.
std::optional<DecodeSpeed> decode_speed(const SpeedShape& shape, const DecodeLoad& load, const Calibration& c,
                                        MissMode mode);
// The fastest of those that are possible; the first of equals. Throws ConfigError if none is.
DecodeSpeed best_decode_speed(const SpeedShape& shape, const DecodeLoad& load, const Calibration& c,
                              std::span<const MissMode> modes);

struct PrefillSpeed {
  double tokens_per_s = 0;
  double bound_tokens_per_s = 0;  // operations / tensor and missed bytes / what reads them, alone
  double compute_s = 0;           // of all chunks
  double link_s = 0;              // until missed bytes have been read, by whatever reads them
};
// mode: how short prompts come to missed bytes: fetch, cpu or split; long ones, from about twelve tokens of
// an expert on, fetch them.
PrefillSpeed prefill_speed(const SpeedShape& shape, double resident_share, int64_t prompt, int64_t chunk,
                           const Calibration& c, MissMode mode = MissMode::fetch);

}  // namespace lighter::offload
