#include "runtime/engine/generator.h"

#include <algorithm>
#include <chrono>
#include <optional>

#include "runtime/engine/stop_matcher.h"
#include "runtime/error.h"

namespace lighter {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kSequence = 0;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

std::vector<float> last_row(const at::Tensor& logits) {
  const at::Tensor row = logits.select(0, logits.size(0) - 1).contiguous();
  const float* data = row.const_data_ptr<float>();
  return {data, data + row.numel()};
}

}  // namespace

const char* finish_reason_name(FinishReason reason) {
  switch (reason) {
    case FinishReason::length:
      return "length";
    case FinishReason::stop_token:
      return "stop_token";
    case FinishReason::stop_string:
      return "stop_string";
    case FinishReason::context_full:
      return "context_full";
    case FinishReason::interrupted:
      return "interrupted";
  }
  return "?";
}

void check_request(const GenerateRequest& request, int64_t context, int64_t vocab, bool has_tokenizer) {
  if (request.prompt.empty()) throw ConfigError("the prompt is empty; give at least one token");
  const auto length = static_cast<int64_t>(request.prompt.size());
  if (length >= context) {
    throw ConfigError("the prompt has " + std::to_string(length) + " tokens, but memory.context is " +
                      std::to_string(context) + "; raise it or shorten the prompt");
  }
  for (const int64_t id : request.prompt) {
    if (id < 0 || id >= vocab) {
      throw ConfigError("prompt id " + std::to_string(id) + " is outside the vocabulary of " +
                        std::to_string(vocab));
    }
  }
  if (!request.stop.empty() && !has_tokenizer) {
    throw ConfigError(
        "generate.stop needs text, but the model has no tokenizer; synthetic weights have none");
  }
}

std::vector<float> Generator::prefill(const GenerateRequest& request, const OnPrefill& on_prefill) {
  const auto& prompt = request.prompt;
  const auto length = static_cast<int64_t>(prompt.size());
  std::vector<float> logits;
  for (int64_t begin = 0; begin < length;) {
    if (interrupted_) throw Interrupted();
    const int64_t count = std::min({request.prefill_chunk, model_.max_tokens_from(begin), length - begin});
    Step step;
    step.add(kSequence, begin, prompt.data() + begin, count);
    logits = last_row(model_.forward(step));
    begin += count;
    if (on_prefill) on_prefill(begin, length);
  }
  return logits;
}

GenerateResult Generator::generate(const GenerateRequest& request, const OnText& on_text,
                                   const OnPrefill& on_prefill) {
  check_request(request, model_.context(), model_.vocab(), tokenizer_ != nullptr);
  GenerateResult result;
  Sampler sampler(request.sampling);
  StopMatcher stops(request.stop);
  std::optional<StreamDecoder> stream;
  if (tokenizer_ != nullptr) stream.emplace(*tokenizer_, true);
  const auto show = [&](const std::string& text) {
    if (text.empty()) return;
    result.text += text;
    on_text(text);
  };

  model_.release(kSequence);
  const auto begin = Clock::now();
  std::vector<float> logits = prefill(request, on_prefill);
  result.prefill_s = seconds_since(begin);
  result.prompt_tokens = static_cast<int64_t>(request.prompt.size());
  auto position = result.prompt_tokens;
  auto decode_begin = Clock::now();
  // The model chooses by itself where nobody needs the logits.
  const bool greedy = request.sampling.temperature == 0 && request.logprobs == 0;
  int64_t likeliest = -1;
  for (;;) {
    if (static_cast<int64_t>(result.ids.size()) >= request.max_tokens) {
      result.finish = FinishReason::length;
      break;
    }
    const int64_t id = likeliest >= 0 ? likeliest : sampler.sample(logits);
    if (request.logprobs > 0) result.logprobs.push_back(top_logprobs(logits, request.logprobs));
    result.ids.push_back(id);
    if (result.ids.size() == 1) {
      result.time_to_first_token_s = seconds_since(begin);
      decode_begin = Clock::now();
    }
    if (request.stop_tokens.contains(id)) {
      result.finish = FinishReason::stop_token;
      break;
    }
    if (stream) show(stops.push(stream->push(id)));
    if (stops.stopped()) {
      result.finish = FinishReason::stop_string;
      break;
    }
    if (interrupted_) {
      result.finish = FinishReason::interrupted;
      break;
    }
    if (static_cast<int64_t>(result.ids.size()) >= request.max_tokens) continue;
    if (position >= model_.context()) {
      result.finish = FinishReason::context_full;
      break;
    }
    Step step;
    step.add(kSequence, position++, &id, 1);
    if (greedy) {
      step.goes_on =
          static_cast<int64_t>(result.ids.size()) + 1 < request.max_tokens && position < model_.context();
      likeliest = model_.likeliest(step).front();
    } else {
      logits = last_row(model_.forward(step));
    }
    ++result.decode_tokens;
  }
  result.decode_s = result.decode_tokens > 0 ? seconds_since(decode_begin) : 0;
  model_.rest();
  if (stream && !stops.stopped()) {
    show(stops.push(stream->flush()));
    show(stops.flush());
  }
  return result;
}

}  // namespace lighter
