// How likely a model finds a text: the sum of the negative log likelihoods of its tokens.
#pragma once

#include <cstdint>
#include <span>

#include "models/decoder.h"
#include "runtime/cli/text_windows.h"
#include "runtime/progress.h"

namespace lighter::cli {

// -log softmax(logits)[target] in nats, in double. Throws DeviceError when it is not finite.
double negative_log_likelihood(std::span<const float> logits, int64_t target);

struct ChunkLimits {
  int64_t tokens = 1;      // in a step
  int64_t logit_rows = 1;  // tokens whose logits are there at once
};

// The sum over all windows, in nats. progress: counts tokens. What was in sequence 0 is forgotten.
// Throws ConfigError when a token is outside the model's vocabulary.
double score_text(models::Decoder& decoder, const TextWindows& text, ChunkLimits limits,
                  const Progress& progress);

}  // namespace lighter::cli
