#include "runtime/moe/miss_mailbox.h"

#include <algorithm>
#include <atomic>
#include <cassert>

#include "runtime/error.h"

namespace lighter {
namespace {

constexpr uint64_t kAlignment = 128;

constexpr uint64_t aligned(uint64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

uint64_t x_bytes(const MissMailboxShape& shape) {
  return aligned(shape.tokens * shape.hidden);
}
uint64_t x_scale_bytes(const MissMailboxShape& shape) {
  return aligned(shape.tokens * (shape.hidden / shape.group) * 4);
}
uint64_t result_bytes(const MissMailboxShape& shape) {
  return aligned(shape.tokens * shape.hidden * sizeof(MissResult));
}
uint64_t choice_bytes(const MissMailboxShape& shape) {
  return aligned(shape.tokens * shape.experts_per_token * 4);
}
uint64_t factor_bytes(const MissMailboxShape& shape) {
  return aligned(shape.tokens * 4);
}
uint64_t slot_bytes(const MissMailboxShape& shape) {
  return 3 * kAlignment + x_bytes(shape) + x_scale_bytes(shape) + factor_bytes(shape) + result_bytes(shape) +
         3 * choice_bytes(shape);
}

// A thread that comes late leaves what is there.
void raise(uint32_t& word, uint32_t step) {
  const std::atomic_ref shared(word);
  for (uint32_t now = shared.load(std::memory_order_relaxed); !step_reached(now, step);) {
    if (shared.compare_exchange_weak(now, step, std::memory_order_acq_rel)) return;
  }
}

}  // namespace

std::string place_of(uint32_t step, int layer) {
  return "step " + std::to_string(step) + ", layer " + std::to_string(layer);
}

int next_posted(const MissPost& post, int experts_per_token, int experts, int after) {
  int next = -1;
  for (int64_t i = 0; i < post.tokens * experts_per_token; ++i) {
    if (post.experts[i] > after && (next < 0 || post.experts[i] < next)) next = post.experts[i];
  }
  if (next < experts) return next;
  throw DeviceError("the GPU posted expert " + std::to_string(next) + " of " + std::to_string(experts));
}

uint64_t MissMailbox::bytes(const MissMailboxShape& shape) {
  return shape.layers * slot_bytes(shape);
}

MissMailbox::MissMailbox(std::byte* memory, const MissMailboxShape& shape) : memory_(memory), shape_(shape) {
  assert(reinterpret_cast<uintptr_t>(memory) % kAlignment == 0);
  for (int layer = 0; layer < shape.layers; ++layer) {
    const MissSlot at = slot(layer);
    *at.posted = *at.guessed = *at.done = *at.ending = 0;
    *at.tokens = 0;
    std::fill_n(at.result, shape.tokens * shape.hidden, MissResult{});  // steps are never 0
  }
}

MissSlot MissMailbox::slot(int layer) const {
  std::byte* at = memory_ + layer * slot_bytes(shape_);
  const auto take = [&at](uint64_t bytes) {
    std::byte* part = at;
    at += bytes;
    return part;
  };
  MissSlot slot;
  slot.posted = reinterpret_cast<uint32_t*>(take(kAlignment));
  slot.tokens = reinterpret_cast<int32_t*>(slot.posted + 1);
  slot.done = reinterpret_cast<uint32_t*>(take(kAlignment));
  slot.ending = slot.done + 1;
  slot.guessed = reinterpret_cast<uint32_t*>(take(kAlignment));
  slot.expected = reinterpret_cast<int32_t*>(take(choice_bytes(shape_)));
  slot.experts = reinterpret_cast<int32_t*>(take(choice_bytes(shape_)));
  slot.weights = reinterpret_cast<float*>(take(choice_bytes(shape_)));
  slot.factors = reinterpret_cast<float*>(take(factor_bytes(shape_)));
  slot.x = reinterpret_cast<int8_t*>(take(x_bytes(shape_)));
  slot.x_scales = reinterpret_cast<float*>(take(x_scale_bytes(shape_)));
  slot.result = reinterpret_cast<MissResult*>(take(result_bytes(shape_)));
  return slot;
}

uint32_t MissMailbox::posted(int layer) const {
  return std::atomic_ref(*slot(layer).posted).load(std::memory_order_acquire);
}

MissPost MissMailbox::read(int layer) const {
  const MissSlot at = slot(layer);
  return {posted(layer), *at.tokens, at.x, at.x_scales, at.factors, at.experts, at.weights};
}

uint32_t MissMailbox::guessed(int layer) const {
  return std::atomic_ref(*slot(layer).guessed).load(std::memory_order_acquire);
}

MissPost MissMailbox::read_expected(int layer) const {
  const MissSlot at = slot(layer);
  return {guessed(layer), 1, nullptr, nullptr, nullptr, at.expected, nullptr};
}

uint32_t MissMailbox::done(int layer) const {
  return std::atomic_ref(*slot(layer).done).load(std::memory_order_acquire);
}

void MissMailbox::write_result(int layer, uint32_t step, int64_t at, const float* values,
                               int64_t count) const {
  MissResult* const result = slot(layer).result + at;
  for (int64_t i = 0; i < count; ++i) {
    std::atomic_ref(result[i]).store({values[i], step}, std::memory_order_relaxed);
  }
}

void MissMailbox::publish_ending(int layer, uint32_t step) const {
  raise(*slot(layer).ending, step);
}

void MissMailbox::publish_done(int layer, uint32_t step) const {
  raise(*slot(layer).done, step);
}

}  // namespace lighter
