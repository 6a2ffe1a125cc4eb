#include "runtime/cli/trace_recorder.h"

#include <algorithm>
#include <cstring>

namespace lighter::cli {

void TraceRecorder::routed(int moe_layer, const Step& step, const at::Tensor& logits,
                           const at::Tensor& experts) {
  const offload::TraceLayout& layout = writer_.layout();
  if (moe_layer == 0) values_.assign(step.tokens.size() * layout.values(), 0);
  put(experts.to(at::kShort), layout.experts(moe_layer));
  put(logits.to(at::kHalf), layout.router(moe_layer));
  if (moe_layer + 1 < static_cast<int>(header_.layers.size())) return;
  const std::vector<uint32_t> positions(step.positions.begin(), step.positions.end());
  writer_.write(positions, values_);
}

void TraceRecorder::guessed(int moe_layer, int depth, const at::Tensor& logits) {
  put(logits.to(at::kHalf), writer_.layout().guess(moe_layer, depth).value());
}

// values: [tokens, n], of 16 bits.
void TraceRecorder::put(const at::Tensor& values, size_t place) {
  const at::Tensor rows = values.cpu().contiguous();
  const auto row_bytes = static_cast<size_t>(rows.size(1) * rows.element_size());
  const auto* from = static_cast<const std::byte*>(rows.const_data_ptr());
  for (int64_t row = 0; row < rows.size(0); ++row) {
    std::memcpy(&values_[row * writer_.layout().values() + place], from + row * row_bytes, row_bytes);
  }
}

}  // namespace lighter::cli
