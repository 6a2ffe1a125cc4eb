// How much room a step's temporaries take at most, from the shapes alone.
#pragma once

#include <cstdint>

#include "models/model_spec.h"
#include "models/weight_formats.h"
#include "runtime/device/device.h"
#include "runtime/dtype.h"

namespace lighter::models {

struct WorkspaceShape {
  int64_t max_tokens = 0;  // in a step
  int64_t context = 0;
  int sequences = 1;
  DType dtype = DType::bf16;
  int64_t slice_width = 0;
  bool cuda = false;
  WeightFormats formats;
  SliceEncoding experts = SliceEncoding::dense;  // of the routed experts
};

uint64_t workspace_bytes(const ModelSpec& spec, const WorkspaceShape& shape);

// Tokens to a prefill step when the configuration leaves it open: as many as a workspace of most_bytes
// allows, within bounds. shape: of the step, but for its tokens.
int64_t default_prefill_chunk(const ModelSpec& spec, WorkspaceShape shape, uint64_t most_bytes);

}  // namespace lighter::models
