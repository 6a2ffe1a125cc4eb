// Which of a model's weights are held packed (int8 or int4) and which in the model's dtype. A plain value;
// the planner counts by it and the loader loads by it.
#pragma once

#include <cstdint>
#include <vector>

#include "models/weights.h"
#include "runtime/dtype.h"
#include "runtime/quant/packed_weight.h"

namespace lighter::models {

struct WeightFormats {
  DType dtype = DType::bf16;             // of what is not packed
  std::vector<SliceEncoding> shared;     // by decoder layer: its shared expert, or its dense FFN
  std::vector<SliceEncoding> attention;  // by decoder layer: q, k, v and o
  SliceEncoding head = SliceEncoding::dense;
  int64_t slice_width = 256;  // of the routed experts' slices; packed FFNs take it where they can

  SliceEncoding of(const Weight& weight) const;
  bool any_packed() const;
};

// Everything in dtype.
WeightFormats dense_formats(const ModelSpec& spec, DType dtype);

// The packed form of a weight, without its place: of a matrix, or for the gate and up rows of a feed-forward
// network the whole network. Throws ConfigError for shapes that do not fit, naming the weight's key.
PackedWeight packed_form(const WeightFormats& formats, const Weight& weight);

// What the weight takes in memory, without alignment. A packed network counts with its gate and up rows.
uint64_t weight_bytes(const WeightFormats& formats, const Weight& weight);

}  // namespace lighter::models
