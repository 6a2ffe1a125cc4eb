// Every weight of a model but the routed experts: what it is, how large, and what it is called in the
// checkpoint. The planner counts with this list and the loader reads by it, so they cannot disagree.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "models/model_spec.h"
#include "runtime/device/device.h"
#include "runtime/progress.h"
#include "runtime/quant/packed_weight.h"

namespace lighter::models {

enum class WeightClass { embedding, attention, norms, router, shared_expert, dense_ffn, head };
const char* weight_class_name(WeightClass weight_class);

enum class WeightRole {
  embedding,
  final_norm,
  head,
  attention_norm,
  qkv,  // q, k and v rows stacked
  o,
  ffn_norm,
  router,
  shared_gate_up,  // gate and up rows stacked
  shared_down,
  dense_gate_up,
  dense_down,
};

// A tensor in the checkpoint, [rows, columns] (columns 0: a vector of `rows`).
struct TensorPart {
  std::string name;
  int64_t rows = 0;
  int64_t columns = 0;

  std::vector<int64_t> shape() const;
  int64_t elements() const { return rows * (columns == 0 ? 1 : columns); }
};

// A weight as the graph uses it: parts stacked by rows.
struct Weight {
  WeightRole role;
  WeightClass weight_class;
  int layer = -1;  // decoder layer; -1: none
  std::vector<TensorPart> parts;

  std::vector<int64_t> shape() const;
  int64_t elements() const;
};

std::vector<Weight> list_weights(const ModelSpec& spec);

// "{}" in a name stands for the layer, "{e}" for the expert.
std::string fill_name(const std::string& pattern, int layer, int expert = -1);

using WeightKey = std::pair<WeightRole, int>;

class TensorSource;
struct WeightFormats;

// Weights in the memory they are computed from: one allocation on the device for all but the embedding, which
// waits in host memory (it is a gather of one row a token), unless the head shares it. Each weight is a
// tensor in the model's dtype or packed (models/weight_formats.h). Immutable once constructed, and then
// thread-safe.
class LoadedWeights {
 public:
  // Packs what is to be packed while it is read, with oneTBB's threads. Throws CapacityError before it reads
  // anything, ConfigError for shapes that a format does not fit, CheckpointError. device must outlive it.
  LoadedWeights(Device& device, const ModelSpec& spec, const TensorSource& source,
                const WeightFormats& formats, const Progress& progress);

  // A weight that is not packed.
  const at::Tensor& at(WeightRole role, int layer = -1) const { return tensors_.at({role, layer}); }
  bool has(WeightRole role, int layer = -1) const { return tensors_.contains({role, layer}); }
  // Null if it is not packed. A packed feed-forward network is one weight, in the role of its gate and up
  // rows.
  const PackedWeight* packed(WeightRole role, int layer = -1) const;
  Device& device() const { return device_; }

  // What the constructor takes, in bytes, each weight aligned.
  static uint64_t device_bytes(const ModelSpec& spec, const WeightFormats& formats);
  static uint64_t host_bytes(const ModelSpec& spec, const WeightFormats& formats);
  // Host, while loading with so many threads.
  static uint64_t staging_bytes(const ModelSpec& spec, const WeightFormats& formats, bool cuda, int threads);

 private:
  Device& device_;
  Buffer on_device_;
  Buffer on_host_;
  std::map<WeightKey, at::Tensor> tensors_;
  std::map<WeightKey, PackedWeight> packed_;
};

}  // namespace lighter::models
