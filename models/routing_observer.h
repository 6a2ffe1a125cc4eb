// Someone who watches the routing while a model runs, for traces. Costs nothing where there is none.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "runtime/engine/step.h"

namespace lighter::models {

// Called from the thread that runs the steps, for each MoE layer in ascending order: routed(), then guessed()
// for what is guessed there. `moe_layer` counts the MoE layers. Tensors are on the device.
class RoutingObserver {
 public:
  virtual ~RoutingObserver() = default;

  // How many decoder layers ahead it wants guesses; ascending.
  virtual const std::vector<int>& guess_depths() const = 0;
  // logits: [tokens, experts], the router's; experts: [tokens, k], the choice, best first.
  virtual void routed(int moe_layer, const Step& step, const at::Tensor& logits,
                      const at::Tensor& experts) = 0;
  // logits: [tokens, experts], what the predictor expects of this layer's router, made `depth` layers
  // earlier.
  virtual void guessed(int moe_layer, int depth, const at::Tensor& logits) = 0;
};

}  // namespace lighter::models
