// What the engine needs of a model. models/Decoder is one.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "runtime/engine/step.h"

namespace lighter {

class Model {
 public:
  virtual ~Model() = default;

  // Logits in fp32 on the host, [rows, vocab]: one row for each sequence, or each token with all_logits.
  virtual at::Tensor forward(const Step& step) = 0;
  // The likeliest token after each sequence's last one, the lowest id of equal ones; not with all_logits. Only the
  // ids come to the host.
  virtual std::vector<int64_t> likeliest(const Step& step) = 0;
  // How many tokens from this position on a step may hold at most for one sequence.
  virtual int64_t max_tokens_from(int64_t position) const = 0;
  virtual int64_t context() const = 0;
  virtual int64_t vocab() const = 0;
  // Forgets a sequence: its slot may begin another.
  virtual void release(int sequence) = 0;
  // No step comes soon: workers that wait for one may sleep.
  virtual void rest() = 0;
};

}  // namespace lighter
