#include "models/workspace.h"

#include <algorithm>
#include <initializer_list>

#include "runtime/moe/packed_ffn.h"
#include "runtime/moe/packed_linear.h"

namespace lighter::models {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;

// cuBLAS keeps 32 MiB for each handle on Hopper (and as much again for cuBLASLt); libtorch's caching
// allocator rounds to 2 and 20 MiB blocks.
constexpr uint64_t kCudaLibraries = 256 * kMiB;
constexpr uint64_t kSmallTensors = 2 * kMiB;

// The larger a chunk, the fewer times the experts that are not resident are streamed; with the largest that
// takes about as long as computing.
constexpr int64_t kLargestChunk = 8192;
constexpr int64_t kSmallestChunk = 1024;

// What the packed ones of some classes' weights need besides, one at a time.
uint64_t packed_scratch(const ModelSpec& spec, const WorkspaceShape& shape,
                        std::initializer_list<WeightClass> classes, int64_t tokens) {
  uint64_t most = 0;
  for (const Weight& weight : list_weights(spec)) {
    const bool wanted = std::ranges::find(classes, weight.weight_class) != classes.end();
    if (!wanted || shape.formats.of(weight) == SliceEncoding::dense ||
        weight_bytes(shape.formats, weight) == 0)
      continue;
    const PackedWeight form = packed_form(shape.formats, weight);
    most = std::max(
        most, form.is_ffn() ? packed_ffn_bytes(form.columns, form.slices * form.slice_width, tokens,
                                               shape.dtype, shape.cuda)
                            : packed_linear_bytes(form.rows, form.columns, tokens, shape.dtype, shape.cuda));
  }
  return most;
}

// The routed experts.
uint64_t moe_bytes(const ModelSpec& spec, const WorkspaceShape& shape) {
  const uint64_t element = dtype_size(shape.dtype);
  const auto tokens = static_cast<uint64_t>(shape.max_tokens);
  const uint64_t hidden = spec.hidden, rows = tokens * spec.experts_per_token;
  // What goes into the experts, twice, and what comes out in fp32; indices.
  const uint64_t rows_bytes = rows * hidden * (2 * element + 4) + rows * 64 + tokens * spec.experts * 16;
  uint64_t experts = rows * (3 * shape.slice_width + hidden) * element;
  if (shape.experts != SliceEncoding::dense && shape.cuda) {
    // Few tokens quantized; or many, in the worst case all, with one expert unpacked.
    const uint64_t ffn = spec.expert_ffn;
    experts = rows * (hidden + hidden / 64 * 8) + kFewTokens * ffn * 8;
    if (rows > static_cast<uint64_t>(kFewTokens))
      experts += 2 * (3 * hidden * ffn + rows * (3 * ffn + hidden));
  }
  const uint64_t by_token =
      3 * tokens * hidden * 4;  // afterwards: the same in the tokens' order, and the sum
  return rows_bytes + std::max(experts, by_token);
}

}  // namespace

// Attention, feed-forward and head never hold their temporaries at the same time, so the largest of them
// counts, beside the residual stream.
uint64_t workspace_bytes(const ModelSpec& spec, const WorkspaceShape& shape) {
  const uint64_t element = dtype_size(shape.dtype);
  const auto tokens = static_cast<uint64_t>(shape.max_tokens);
  const uint64_t hidden = spec.hidden;
  const bool fused =
      shape.cuda && shape.dtype == DType::bf16;  // norms and attention in single passes, without masks
  const uint64_t stream =
      tokens * hidden * (4 * element + (fused ? 0 : 3 * 4));  // residual, normed, output; three fp32 copies

  const uint64_t q = spec.heads * spec.head_dim;
  const uint64_t kv = spec.kv_heads * spec.head_dim;
  const auto keys = static_cast<uint64_t>(shape.context);
  const uint64_t group = spec.heads / spec.kv_heads;
  const uint64_t masks =
      tokens > 1 && !fused ? 2 * tokens * keys * (8 + 1 + element + 2 * group * element) : 0;
  const uint64_t batch_masks =
      shape.sequences > 1 ? 2 * shape.sequences * keys * (8 + 8 + 1 + 2 * element) : 0;
  const uint64_t scores =
      shape.cuda ? tokens * spec.heads * 4 : 2 * 4 * kMiB;  // flash attention's sums; its tiles
  const uint64_t attention = tokens * (q + 2 * kv) * (2 * element + (fused ? 0 : 4 * 4)) +
                             2 * keys * kv * element * shape.sequences + scores +
                             packed_scratch(spec, shape, {WeightClass::attention}, shape.max_tokens);

  uint64_t feed_forward = 0;
  if (spec.dense_layers() > 0) feed_forward = tokens * 3 * spec.dense_ffn * element;
  // The shared expert comes before the routed ones and leaves its output.
  feed_forward = std::max(
      {feed_forward, tokens * 3 * spec.shared_ffn * element,
       packed_scratch(spec, shape, {WeightClass::shared_expert, WeightClass::dense_ffn}, shape.max_tokens)});
  if (spec.moe_layers() > 0) {
    feed_forward = tokens * hidden * element + std::max(feed_forward, moe_bytes(spec, shape));
  }
  const uint64_t head = static_cast<uint64_t>(shape.sequences) * spec.vocab * (element + 4 + 4) +
                        packed_scratch(spec, shape, {WeightClass::head}, shape.sequences);
  const uint64_t largest = std::max({attention, feed_forward, head});
  return (stream + masks + batch_masks + largest) * 5 / 4 + kSmallTensors + (shape.cuda ? kCudaLibraries : 0);
}

int64_t default_prefill_chunk(const ModelSpec& spec, WorkspaceShape shape, uint64_t most_bytes) {
  if (!shape.cuda) return std::min<int64_t>(shape.context, 128);
  int64_t chunk = kLargestChunk;
  for (; chunk > kSmallestChunk; chunk /= 2) {
    shape.max_tokens = std::min(chunk, shape.context);
    if (workspace_bytes(spec, shape) <= most_bytes) break;
  }
  return std::min(chunk, shape.context);
}

}  // namespace lighter::models
