// Picks the next token from logits. Greedy at temperature 0; otherwise temperature, then top-k, top-p and
// min-p cut the distribution, and a seeded generator draws. Not thread-safe (it owns the generator).
#pragma once

#include <cstdint>
#include <optional>
#include <random>
#include <span>
#include <vector>

namespace lighter {

struct SamplingOptions {
  double temperature = 0;
  std::optional<int> top_k;      // the k likeliest
  std::optional<double> top_p;   // the likeliest whose probabilities first reach p
  std::optional<double> min_p;   // those at least p times as likely as the likeliest
  std::optional<uint64_t> seed;  // none: another one each time
};

struct TokenLogprob {
  int64_t id = 0;
  double logprob = 0;
};

class Sampler {
 public:
  explicit Sampler(const SamplingOptions& options);

  // logits: [vocab], finite or -inf; throws DeviceError if one is NaN or +inf, or all are -inf. Ties go to
  // the lower id.
  int64_t sample(std::span<const float> logits);

 private:
  SamplingOptions options_;
  std::mt19937_64 generator_;
};

// The k likeliest tokens of the unscaled distribution, likeliest first.
std::vector<TokenLogprob> top_logprobs(std::span<const float> logits, int k);

}  // namespace lighter
