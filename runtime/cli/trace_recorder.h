// Puts the routing that a model reports into a trace file.
#pragma once

#include <vector>

#include "models/routing_observer.h"
#include "offload/trace.h"

namespace lighter::cli {

// Watch a decoder with it. Tokens are written step by step, each step when its last MoE layer has routed, so
// the sequences must not be interleaved. Not thread-safe.
class TraceRecorder : public models::RoutingObserver {
 public:
  // Both must outlive it; header is the writer's.
  TraceRecorder(const offload::TraceHeader& header, offload::TraceWriter& writer)
      : header_(header), writer_(writer) {}

  const std::vector<int>& guess_depths() const override { return header_.depths; }
  void routed(int moe_layer, const Step& step, const at::Tensor& logits, const at::Tensor& experts) override;
  void guessed(int moe_layer, int depth, const at::Tensor& logits) override;

 private:
  void put(const at::Tensor& values, size_t place);

  const offload::TraceHeader& header_;
  offload::TraceWriter& writer_;
  std::vector<uint16_t> values_;  // of the step at hand, as in the file
};

}  // namespace lighter::cli
