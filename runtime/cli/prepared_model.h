// Everything that is known about a run before anything is allocated: what the model is and where its bytes
// go.
#pragma once

#include <filesystem>

#include "models/decode_graph.h"
#include "models/model_spec.h"
#include "models/stored_formats.h"
#include "models/workspace.h"
#include "offload/planner.h"
#include "runtime/config/config.h"
#include "runtime/kv/kv_cache.h"

namespace lighter::cli {

struct PreparedModel {
  models::ModelSpec spec;
  models::WeightFormats formats;                // of all but the routed experts
  std::optional<models::StoredFormats> stored;  // the same, where the model's folder holds it packed
  int64_t slice_width = 0;
  uint64_t slice_bytes = 0;
  int64_t prefill_chunk = 0;
  int threads = 1;
  KvShape kv;
  uint64_t workspace_bytes = 0;
  uint64_t reserve_bytes = 0;
  std::string why_eager;  // empty: tokens are decoded as a CUDA graph
  // What a graph's step does about slices that are not resident, never automatic, and why.
  OffloadConfig::Miss miss = OffloadConfig::Miss::fetch;
  std::string why_miss;
  offload::Plan plan;

  bool cpu_computes() const { return miss == OffloadConfig::Miss::cpu || miss == OffloadConfig::Miss::split; }
};

// Reads config.json (or takes the preset) and plans. Throws ConfigError, CheckpointError; a plan that does
// not fit is returned, not thrown.
PreparedModel prepare(const Config& config);

// What the decode graph is made for; refers to model.
models::DecodeGraphShape decode_graph_shape(const PreparedModel& model, const Config& config);

// How many tokens' logits a prefill step may make at once within the planned workspace; at least 1.
int64_t logit_rows(const PreparedModel& model, const Config& config);

}  // namespace lighter::cli
