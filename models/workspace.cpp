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

}  // namespace

// Attention, feed-forward and head never hold their temporaries at the same time, so the largest of them
// counts, beside the residual stream.
uint64_t workspace_bytes(const ModelSpec& spec, const WorkspaceShape& shape) {
  const uint64_t element = dtype_size(shape.dtype);
  const auto tokens = static_cast<uint64_t>(shape.max_tokens);
  const uint64_t hidden = spec.hidden;
  const uint64_t stream =
      tokens * hidden * (4 * element + 3 * 4);  // residual, normed, output; three fp32 copies

  const uint64_t q = spec.heads * spec.head_dim;
  const uint64_t kv = spec.kv_heads * spec.head_dim;
  const auto keys = static_cast<uint64_t>(shape.context);
  const uint64_t group = spec.heads / spec.kv_heads;
  const uint64_t masks = tokens > 1 ? 2 * tokens * keys * (8 + 1 + element + 2 * group * element) : 0;
  const uint64_t scores = shape.cuda ? 0 : 2 * 4 * kMiB;  // flash attention's tiles
  const uint64_t attention = tokens * (q + 2 * kv) * (2 * element + 4 * 4) +
                             2 * keys * kv * element * shape.sequences + scores +
                             packed_scratch(spec, shape, {WeightClass::attention}, shape.max_tokens);

  uint64_t feed_forward = 0;
  if (spec.dense_layers() > 0) feed_forward = tokens * 3 * spec.dense_ffn * element;
  if (spec.moe_layers() > 0) {
    const uint64_t rows = tokens * spec.experts_per_token;
    const uint64_t unpacked = 3 * hidden * shape.slice_width * 2;  // a quantized slice, for many tokens
    const uint64_t routed = unpacked +
                            rows * (hidden * (2 * element + 3 * 4) + 3 * shape.slice_width * element) +
                            tokens * (hidden * 2 * 4 + spec.experts * 16);
    feed_forward = std::max<uint64_t>(feed_forward, routed + tokens * 3 * spec.shared_ffn * element);
  }
  feed_forward +=
      packed_scratch(spec, shape, {WeightClass::shared_expert, WeightClass::dense_ffn}, shape.max_tokens);
  const uint64_t head = static_cast<uint64_t>(shape.sequences) * spec.vocab * (element + 4 + 4) +
                        packed_scratch(spec, shape, {WeightClass::head}, shape.sequences);
  const uint64_t largest = std::max({attention, feed_forward, head});
  return (stream + masks + largest) * 5 / 4 + kSmallTensors + (shape.cuda ? kCudaLibraries : 0);
}

int64_t default_prefill_chunk(const ModelSpec&, int64_t context, bool cuda) {
  return std::min<int64_t>(context, cuda ? 1024 : 128);
}

}  // namespace lighter::models
