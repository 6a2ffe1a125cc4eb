#include "runtime/cli/perplexity.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "runtime/error.h"

namespace lighter::cli {
namespace {

constexpr int kSequence = 0;

double score_window(models::Decoder& decoder, const TextWindow& window, ChunkLimits limits,
                    const std::function<void(int64_t tokens)>& on_step) {
  check_ids(window.inputs, decoder.vocab());
  check_ids(window.targets, decoder.vocab());
  decoder.release(kSequence);
  double nll = 0;
  const auto length = static_cast<int64_t>(window.inputs.size());
  for (int64_t begin = 0; begin < length;) {
    const int64_t count = std::min({limits.tokens, decoder.max_tokens_from(begin), length - begin});
    Step step;
    step.add(kSequence, begin, window.inputs.data() + begin, count);
    decoder.forward_all(step, limits.logit_rows, [&](int64_t first, const at::Tensor& logits) {
      const at::Tensor rows = logits.contiguous();
      const auto vocab = static_cast<size_t>(rows.size(1));
      for (int64_t row = 0; row < rows.size(0); ++row) {
        nll += negative_log_likelihood({rows.const_data_ptr<float>() + row * rows.size(1), vocab},
                                       window.targets[begin + first + row]);
      }
    });
    begin += count;
    on_step(count);
  }
  return nll;
}

}  // namespace

double negative_log_likelihood(std::span<const float> logits, int64_t target) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - top);
  const double nll = top + std::log(sum) - logits[target];
  if (!std::isfinite(nll)) {
    throw DeviceError(
        "the model's logits are not finite; the weights may be damaged, or bf16 too narrow for them "
        "(try model.dtype: fp32)");
  }
  return nll;
}

double score_text(models::Decoder& decoder, const TextWindows& text, ChunkLimits limits,
                  const Progress& progress) {
  const auto total = static_cast<uint64_t>(text.tokens);
  uint64_t done = 0;
  double nll = 0;
  progress("scoring", 0, total);
  for (const TextWindow& window : text.windows) {
    nll += score_window(decoder, window, limits, [&](int64_t tokens) {
      done += static_cast<uint64_t>(tokens);
      progress("scoring", done, total);
    });
  }
  return nll;
}

}  // namespace lighter::cli
