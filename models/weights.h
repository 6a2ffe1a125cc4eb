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
#include "runtime/dtype.h"
#include "runtime/progress.h"

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
using WeightMap = std::map<WeightKey, at::Tensor>;

class TensorSource;

// Weights in the memory they are computed from: one allocation on the device for all but the embedding, which
// waits in host memory (it is a gather of one row a token), unless the head shares it.
class LoadedWeights {
 public:
  // Throws CapacityError before it reads anything, CheckpointError.
  LoadedWeights(Device& device, const ModelSpec& spec, const TensorSource& source, DType dtype,
                const Progress& progress);

  const at::Tensor& at(WeightRole role, int layer = -1) const { return tensors_.at({role, layer}); }
  bool has(WeightRole role, int layer = -1) const { return tensors_.contains({role, layer}); }

  // What the constructor takes, in bytes, each weight aligned.
  static uint64_t device_bytes(const ModelSpec& spec, DType dtype);
  static uint64_t host_bytes(const ModelSpec& spec, DType dtype);
  static uint64_t staging_bytes(bool cuda);  // host, while loading

 private:
  Buffer on_device_;
  Buffer on_host_;
  WeightMap tensors_;
};

}  // namespace lighter::models
