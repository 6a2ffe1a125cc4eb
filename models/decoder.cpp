#include "models/decoder.h"

#include <algorithm>

#include "models/linear.h"
#include "runtime/error.h"
#include "runtime/torch/tensors.h"

namespace lighter::models {

Decoder::Decoder(const ModelSpec& spec, const LoadedWeights& weights, KvCache& kv, ExpertExecutor* executor,
                 RoutingSchedule schedule, Device& device, DType dtype)
    : spec_(spec),
      weights_(weights),
      kv_(kv),
      executor_(executor),
      device_(device),
      dtype_(dtype),
      attention_(spec, weights, kv, device, dtype) {
  if (executor != nullptr) moe_.emplace(spec, weights, *executor, std::move(schedule), device);
}

// Whoever watches the routing needs it on the host.
bool Decoder::fits_graph(const Step& step) const {
  return graph_ != nullptr && !observed_ && step.tokens.size() == 1 && step.sequences[0] == 0;
}

std::vector<int64_t> Decoder::likeliest(const Step& step) {
  if (fits_graph(step)) return {graph_->step(step.tokens[0], step.positions[0], step.goes_on)};
  const at::Tensor ids = logits(last_hidden_states(step)).argmax(1).cpu();  // waits for the device
  if (executor_ != nullptr) executor_->between_steps();
  return {ids.const_data_ptr<int64_t>(), ids.const_data_ptr<int64_t>() + ids.numel()};
}

at::Tensor Decoder::forward(const Step& step) {
  if (fits_graph(step)) {
    graph_->step(step.tokens[0], step.positions[0], false);
    return graph_->logits();
  }
  at::Tensor result =
      logits(step.all_logits ? hidden_states(step) : last_hidden_states(step)).cpu();  // waits
  if (executor_ != nullptr) executor_->between_steps();
  return result;
}

void Decoder::forward_all(const Step& step, int64_t rows,
                          const std::function<void(int64_t first, const at::Tensor& logits)>& on_logits) {
  const at::Tensor hidden = hidden_states(step);
  device_.compute_stream().synchronize();
  if (executor_ != nullptr) executor_->between_steps();  // throws what its workers met
  for (int64_t first = 0; first < hidden.size(0); first += rows) {
    on_logits(first, logits(hidden.narrow(0, first, std::min(rows, hidden.size(0) - first))).cpu());
  }
}

// [tokens, hidden], before the last norm.
at::Tensor Decoder::hidden_states(const Step& step) {
  rest();
  const KvCache::StepIndex index = kv_.index(step);
  const AttentionStep attention_step = attention_.begin_step(step, index);
  at::Tensor x = embed(weights_, spec_, step.tokens, dtype_);  // [tokens, hidden]
  for (int layer = 0; layer < static_cast<int>(spec_.layers.size()); ++layer) {
    const at::Tensor normed = rms_norm(x, weights_.at(WeightRole::attention_norm, layer), spec_.norm_eps);
    x = x.add(attention_.forward(layer, normed, attention_step));
    x = x.add(feed_forward(layer, x, step));
  }
  return x;
}

// [sequences, hidden]: of each sequence's last token.
at::Tensor Decoder::last_hidden_states(const Step& step) {
  std::vector<int64_t> last;
  for (size_t i = 0; i < step.sequences.size(); ++i) last.push_back(step.offsets[i + 1] - 1);
  return hidden_states(step).index_select(0, to_device(last, device_));
}

at::Tensor Decoder::feed_forward(int layer, const at::Tensor& residual, const Step& step) const {
  const at::Tensor x = rms_norm(residual, weights_.at(WeightRole::ffn_norm, layer), spec_.norm_eps);
  if (spec_.layers[layer].moe_layer >= 0) return moe_->forward(layer, residual, x, step);
  return dense_ffn(x, weights_, layer);
}

// [tokens, vocab] in fp32, on the device.
at::Tensor Decoder::logits(const at::Tensor& hidden) const {
  const at::Tensor normed = rms_norm(hidden, weights_.at(WeightRole::final_norm), spec_.norm_eps);
  return linear(normed, weights_, WeightRole::head).to(at::kFloat);
}

void Decoder::rest() {
  if (graph_ != nullptr) graph_->rest();
}

KvShape kv_shape(const ModelSpec& spec, int64_t context, int64_t block, int sequences, DType dtype) {
  if (context > spec.max_context) {
    throw ConfigError("memory.context is " + std::to_string(context) + ", but the model was made for " +
                      std::to_string(spec.max_context) + " positions; lower it");
  }
  KvShape shape;
  for (const LayerSpec& layer : spec.layers) shape.chunked.push_back(layer.chunked);
  shape.chunk = spec.attention_chunk;
  shape.kv_heads = spec.kv_heads;
  shape.head_dim = spec.head_dim;
  shape.block = block;
  shape.context = context;
  shape.sequences = sequences;
  shape.dtype = dtype;
  return shape;
}

}  // namespace lighter::models
