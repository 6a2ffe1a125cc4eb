// How a GPU's decode step hands missed experts to the CPU without a host round trip: one slot for each MoE
// layer, in memory that both read and write (pinned, mapped). The memory belongs to the caller and has the
// same offsets for both; this class only knows where things lie.
//
// The device writes tokens, x, x_scales, factors, experts and weights, then after a system-wide fence posted
// = the step's number. The CPU writes result, each value with the step's number beside it; while it writes
// the last ones, ending = that number; after all of them done = that number. So the device need not ask first
// whether the result is there and then for the result, each a way over the bus and back: from `ending` on it
// loads values until they are the step's. It goes on when it has the result, though a worker may still be at
// what others have done in its place; so a worker takes no notice of what it reads in a slot when the layer
// is done, and before the host changes what workers look up it waits until none does. Steps are numbered
// upwards from 1, layers are posted in order, and a slot is written again only when its result is whole, or
// when the device has waited too long for it. Accessors of the control words are thread-safe.
//
// The device may also tell what it expects a layer to choose for a single token: it writes expected, then
// after a fence guessed = the step's number, before the layer is posted and while one before it is under way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "runtime/step_number.h"

namespace lighter {

struct MissMailboxShape {
  int layers = 0;
  int64_t tokens = 1;  // at most
  int64_t hidden = 0;
  int experts_per_token = 1;
  int64_t group = 64;  // values of x with a scale of their own
};

// A value of a result, and whose it is. Read and written as one.
struct alignas(8) MissResult {
  float value = 0;
  uint32_t step = 0;
};

// Addresses of a slot's parts; each begins at a multiple of 128 bytes but for `tokens`, which lies beside
// `posted`, and `ending`, beside `done`.
struct MissSlot {
  uint32_t* posted = nullptr;
  int32_t* tokens = nullptr;
  uint32_t* guessed = nullptr;
  int32_t* expected = nullptr;  // [experts_per_token]
  // Quantized as runtime/quant/activations.h says, in order, not scaled by the routing's weight.
  int8_t* x = nullptr;          // [tokens, hidden]
  float* x_scales = nullptr;    // [tokens, hidden / group]
  float* factors = nullptr;     // [tokens]: x times this is the experts' input
  int32_t* experts = nullptr;   // [tokens, experts_per_token]
  float* weights = nullptr;     // [tokens, experts_per_token]
  uint32_t* done = nullptr;
  uint32_t* ending = nullptr;
  MissResult* result = nullptr;  // [tokens, hidden]
};

// What the device has posted, or expects to.
struct MissPost {
  uint32_t step = 0;
  int64_t tokens = 0;
  const int8_t* x = nullptr;
  const float* x_scales = nullptr;
  const float* factors = nullptr;
  const int32_t* experts = nullptr;
  const float* weights = nullptr;

  bool is_expected() const { return weights == nullptr; }
};

class MissMailbox {
 public:
  static uint64_t bytes(const MissMailboxShape& shape);

  // memory: bytes(shape), aligned to 128. Clears the control words and the results.
  MissMailbox(std::byte* memory, const MissMailboxShape& shape);

  const MissMailboxShape& shape() const { return shape_; }
  MissSlot slot(int layer) const;

  // For the CPU. After posted() has shown a step, read() shows what belongs to it.
  uint32_t posted(int layer) const;
  MissPost read(int layer) const;
  // Likewise; of an expected post, which has one token, step and experts are known.
  uint32_t guessed(int layer) const;
  MissPost read_expected(int layer) const;
  // Of the layer's result, `count` values from value `at` on. Any number of threads, each its own values.
  void write_result(int layer, uint32_t step, int64_t at, const float* values, int64_t count) const;
  // By any number of threads; one that comes late does no harm.
  void publish_ending(int layer, uint32_t step) const;
  void publish_done(int layer, uint32_t step) const;
  uint32_t done(int layer) const;

 private:
  std::byte* memory_;
  MissMailboxShape shape_;
};

// For people: where in a step something happened.
std::string place_of(uint32_t step, int layer);

// The smallest of the posted experts above `after`, or -1. experts_per_token: of the mailbox. Throws
// DeviceError if it is none of `experts`.
int next_posted(const MissPost& post, int experts_per_token, int experts, int after);

// Calls body(expert) for each of the posted experts, ascending, once.
template <typename Body>
void for_posted(const MissPost& post, int experts_per_token, int experts, const Body& body) {
  for (int expert = next_posted(post, experts_per_token, experts, -1); expert >= 0;
       expert = next_posted(post, experts_per_token, experts, expert)) {
    body(expert);
  }
}

}  // namespace lighter
