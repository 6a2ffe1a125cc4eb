// The speed of a planned run, by offload/speed_model.h.
#pragma once

#include <vector>

#include "offload/speed_model.h"
#include "runtime/cli/prepared_model.h"

namespace lighter::cli {

offload::SpeedShape speed_shape(const PreparedModel& model, const Config& config);
offload::MissMode miss_mode(const PreparedModel& model);  // as the plan has chosen
offload::MissMode miss_mode_of_prompts(const PreparedModel& model, const Config& config);  // short ones
offload::MissMode miss_mode_of_batches(const PreparedModel& model, const Config& config);

struct PredictedSpeed {
  double decode_context = 0;               // keys: half of memory.context, the mean of filling it
  offload::DecodeSpeed decode;             // misses as the plan has chosen
  std::vector<offload::DecodeSpeed> ways;  // all that this decoding could have taken, the chosen one too
  std::optional<double> decode_bound_tokens_per_s;
  int64_t prefill_tokens = 0;  // of the prompt: 8192, or the context
  offload::PrefillSpeed prefill;
};
PredictedSpeed predict_speed(const PreparedModel& model, const Config& config, const offload::Calibration& c);

}  // namespace lighter::cli
