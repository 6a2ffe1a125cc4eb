#include "bench/requests.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <chrono>

#include "runtime/error.h"

namespace lighter::bench {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

}  // namespace

RequestSample Requests::run(const std::vector<std::vector<int64_t>>& prompts, int64_t generated_tokens) {
  RequestSample sample;
  const int batch = static_cast<int>(prompts.size());
  for (int sequence = 0; sequence < batch; ++sequence) model_.release(sequence);
  last_.clear();
  meter_.begin(counters_());
  const auto begin = Clock::now();
  while (static_cast<int>(last_.size()) < batch) {
    prefill(prompts);
    sample.first_token_s.resize(last_.size(), seconds_since(begin));
  }
  sample.prefill = meter_.end(counters_());
  position_ = static_cast<int64_t>(prompts.front().size());

  meter_.begin(counters_());
  for (int64_t made = 1; made < generated_tokens; ++made) {
    const auto step = Clock::now();
    decode_step(made + 1 < generated_tokens);
    sample.step_s.push_back(seconds_since(step));
  }
  sample.decode = meter_.end(counters_());
  model_.rest();
  return sample;
}

bool Requests::one_more_step() {
  if (position_ >= model_.context()) return false;
  decode_step(false);
  return true;
}

void Requests::prefill(const std::vector<std::vector<int64_t>>& prompts) {
  const auto first = static_cast<int>(last_.size());
  const std::vector<int64_t>& prompt = prompts[first];
  const auto length = static_cast<int64_t>(prompt.size());
  if (length <= std::min(prefill_chunk_ / 2, model_.max_tokens_from(0))) {
    check_interrupted();
    const int end = static_cast<int>(std::min<int64_t>(first + prefill_chunk_ / length, prompts.size()));
    Step step;
    for (int i = first; i < end; ++i) step.add(i, 0, prompts[i].data(), length);
    for (const int64_t id : model_.likeliest(step)) last_.push_back(id);
    return;
  }
  int64_t next = 0;
  for (int64_t begin = 0; begin < length;) {
    check_interrupted();
    const int64_t count = std::min({prefill_chunk_, model_.max_tokens_from(begin), length - begin});
    Step step;
    step.add(first, begin, prompt.data() + begin, count);
    next = model_.likeliest(step).front();
    begin += count;
  }
  last_.push_back(next);
}

void Requests::decode_step(bool goes_on) {
  check_interrupted();
  Step step;
  for (size_t i = 0; i < last_.size(); ++i) step.add(static_cast<int>(i), position_, &last_[i], 1);
  ++position_;
  step.goes_on = goes_on;
  last_ = model_.likeliest(step);
}

void Requests::check_interrupted() const {
  if (interrupted_) throw Interrupted();
}

}  // namespace lighter::bench
