// A model's folder written anew, quantized: what `lighter quantize` does once it knows the text's tokens.
#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "runtime/cli/prepared_model.h"
#include "runtime/progress.h"

namespace lighter::cli {

struct QuantizeReport {
  uint64_t bytes_before = 0, bytes = 0;  // of the weights in the folders
  uint64_t workspace_bytes = 0, workspace_peak_bytes = 0;
  int experts_short_of_text = 0;  // see ModelQuantizer; 0 where experts are not in int4
};

// Whether anything will be in int4, which is rounded by a text. Throws ConfigError where nothing can be
// quantized, or nothing is to be.
bool needs_text(const Config& config, const PreparedModel& model);

// texts: token ids, each a sequence no longer than memory.context; none where none are needed. out: a folder
// that is not there yet; it appears once it is whole. model: prepared from config. Needs the dense weights
// but the experts on the device. Throws ConfigError, CapacityError, CheckpointError.
QuantizeReport quantize(const Config& config, const PreparedModel& model,
                        const std::vector<std::vector<int64_t>>& texts, const std::filesystem::path& out,
                        const Progress& progress);

}  // namespace lighter::cli
