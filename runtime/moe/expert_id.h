// Names for experts and slices.
//
// `layer` counts the model's MoE layers (0 … moe_layers-1), not its decoder layers: a model with dense layers
// between them has fewer. An expert is cut along its FFN dimension into equal slices, each holding the gate
// rows, up rows and down columns of one range; the expert's output is the sum of its slices' outputs. The
// slice is the unit of residency and of transfer.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>

namespace lighter {

struct ExpertId {
  int layer = 0;
  int expert = 0;
  auto operator<=>(const ExpertId&) const = default;
};

struct SliceId {
  int layer = 0;
  int expert = 0;
  int slice = 0;
  auto operator<=>(const SliceId&) const = default;
  ExpertId owner() const { return {layer, expert}; }
};

// How many experts and slices a model has. All layers are alike.
struct ExpertGrid {
  int layers = 0;
  int experts = 0;
  int slices = 0;  // of each expert
  uint64_t slice_bytes = 0;

  size_t slices_per_layer() const { return static_cast<size_t>(experts) * slices; }
  size_t total_slices() const { return slices_per_layer() * layers; }
  uint64_t expert_bytes() const { return slice_bytes * slices; }
  uint64_t total_bytes() const { return slice_bytes * total_slices(); }
  // A slice's place in a table of total_slices() entries.
  size_t index(SliceId id) const {
    return (static_cast<size_t>(id.layer) * experts + id.expert) * slices + id.slice;
  }
};

}  // namespace lighter
