// Generates the continuation of one prompt: prefill in chunks, then a token a step. Not thread-safe.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "runtime/engine/model.h"
#include "runtime/engine/sampler.h"
#include "runtime/tokenizer/tokenizer.h"

namespace lighter {

struct GenerateRequest {
  std::vector<int64_t> prompt;
  int64_t max_tokens = 256;
  int64_t prefill_chunk = 512;
  SamplingOptions sampling;
  std::set<int64_t> stop_tokens;  // they end the text and are not part of it, but of ids
  std::vector<std::string> stop;  // likewise; need a tokenizer
  int logprobs = 0;               // alternatives reported for each token
};

enum class FinishReason { length, stop_token, stop_string, context_full, interrupted };
const char* finish_reason_name(FinishReason reason);

struct GenerateResult {
  std::vector<int64_t> ids;
  std::string text;
  std::vector<std::vector<TokenLogprob>> logprobs;
  FinishReason finish = FinishReason::length;
  double prefill_s = 0;              // the prompt's steps
  double time_to_first_token_s = 0;  // until the first token was there
  double decode_s = 0;               // the steps after it
  int64_t prompt_tokens = 0;
  int64_t decode_tokens = 0;  // tokens that decode_s made

  double prefill_tokens_per_s() const {
    return prefill_s > 0 ? static_cast<double>(prompt_tokens) / prefill_s : 0;
  }
  double decode_tokens_per_s() const {
    return decode_s > 0 ? static_cast<double>(decode_tokens) / decode_s : 0;
  }
};

// text: what the token completes; may be empty.
using OnText = std::function<void(const std::string& text)>;
using OnPrefill = std::function<void(int64_t done, int64_t total)>;

// Throws ConfigError for a prompt that is empty, too long, or has ids outside the vocabulary, and for stop strings
// without a tokenizer.
void check_request(const GenerateRequest& request, int64_t context, int64_t vocab, bool has_tokenizer);

class Generator {
 public:
  // tokenizer may be null: then there is no text. interrupted: set by a signal; generation ends after the
  // step.
  Generator(Model& model, const Tokenizer* tokenizer, const std::atomic<bool>& interrupted)
      : model_(model), tokenizer_(tokenizer), interrupted_(interrupted) {}

  // Throws what check_request throws, and Interrupted when that comes before the first token.
  GenerateResult generate(const GenerateRequest& request, const OnText& on_text,
                          const OnPrefill& on_prefill = {});

 private:
  std::vector<float> prefill(const GenerateRequest& request, const OnPrefill& on_prefill);

  Model& model_;
  const Tokenizer* tokenizer_;
  const std::atomic<bool>& interrupted_;
};

}  // namespace lighter
