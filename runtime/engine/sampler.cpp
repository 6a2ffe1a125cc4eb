#include "runtime/engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "runtime/error.h"

namespace lighter {
namespace {

int64_t likeliest(std::span<const float> logits) {
  int64_t best = -1;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (std::isnan(logits[i]) || logits[i] == INFINITY) {
      throw DeviceError("the model gave " + std::string(std::isnan(logits[i]) ? "NaN" : "infinity") +
                        " for token " + std::to_string(i) +
                        "; the weights may be damaged, or bf16 too narrow for them (try model.dtype: fp32)");
    }
    if (logits[i] > (best < 0 ? -INFINITY : logits[best])) best = static_cast<int64_t>(i);
  }
  if (best < 0) throw DeviceError("the model gave no token a finite logit; the weights may be damaged");
  return best;
}

// Candidates, likeliest first; ties by id.
std::vector<int64_t> ranked(std::span<const float> logits, size_t count) {
  std::vector<int64_t> ids(logits.size());
  std::iota(ids.begin(), ids.end(), 0);
  count = std::min(count, ids.size());
  std::partial_sort(
      ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(count), ids.end(),
      [&](int64_t a, int64_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
  ids.resize(count);
  return ids;
}

}  // namespace

Sampler::Sampler(const SamplingOptions& options)
    : options_(options), generator_(options.seed ? *options.seed : std::random_device{}()) {}

int64_t Sampler::sample(std::span<const float> logits) {
  const int64_t best = likeliest(logits);
  if (options_.temperature == 0) return best;

  const auto ids = ranked(logits, options_.top_k ? static_cast<size_t>(*options_.top_k) : logits.size());
  std::vector<double> weights;  // relative to the likeliest
  for (const int64_t id : ids) {
    weights.push_back(std::exp((static_cast<double>(logits[id]) - logits[best]) / options_.temperature));
  }
  size_t kept = weights.size();
  if (options_.top_p) {
    const double limit = *options_.top_p * std::accumulate(weights.begin(), weights.end(), 0.0);
    double sum = 0;
    kept = 0;
    while (kept < weights.size() && (kept == 0 || sum < limit)) sum += weights[kept++];
  }
  // Also what has no weight at all: rounding must not lead the draw there.
  while (kept > 1 && (weights[kept - 1] == 0 || weights[kept - 1] < options_.min_p.value_or(0))) --kept;
  double left = static_cast<double>(generator_() >> 11) * 0x1.0p-53 *
                std::accumulate(weights.begin(), weights.begin() + static_cast<std::ptrdiff_t>(kept), 0.0);
  size_t chosen = 0;
  while (chosen + 1 < kept && left >= weights[chosen]) left -= weights[chosen++];
  return ids[chosen];
}

std::vector<TokenLogprob> top_logprobs(std::span<const float> logits, int k) {
  const double top = logits[likeliest(logits)];
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - top);
  std::vector<TokenLogprob> result;
  for (const int64_t id : ranked(logits, static_cast<size_t>(k))) {
    result.push_back({id, logits[id] - top - std::log(sum)});
  }
  return result;
}

}  // namespace lighter
