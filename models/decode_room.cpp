#include "models/decode_room.h"

#include <algorithm>

#include "runtime/kernels/decode_attention.h"
#include "runtime/step_number.h"

namespace lighter::models {

using kernels::WeightFormat;

namespace {

// Values of a group of the experts' weights; of bf16 it only divides work.
int64_t group_of(const DecodeGraphShape& shape) {
  return shape.encoding == SliceEncoding::dense ? 64 : group_size(shape.encoding);
}

bool any_layer(const ModelSpec& spec, bool chunked) {
  return std::any_of(spec.layers.begin(), spec.layers.end(),
                     [&](const LayerSpec& layer) { return layer.chunked == chunked; });
}

}  // namespace

WeightFormat format_of(SliceEncoding encoding) {
  if (encoding == SliceEncoding::int8) return WeightFormat::int8;
  return encoding == SliceEncoding::int4 ? WeightFormat::int4 : WeightFormat::bf16;
}

int groups_per_slice(const DecodeGraphShape& shape) {
  return static_cast<int>(shape.slice_width / group_of(shape));
}

TableLayout::TableLayout(const DecodeGraphShape& shape) {
  for (const bool chunked : {false, true}) {
    if (!any_layer(shape.spec, chunked)) continue;
    const int64_t positions = chunked ? std::min(shape.spec.attention_chunk, shape.context) : shape.context;
    blocks[chunked] = static_cast<int>((positions + shape.kv_block - 1) / shape.kv_block);
  }
  forced_at = blocks[0] + blocks[1];
  guessed_at = forced_at + shape.experts.layers * shape.spec.experts_per_token;
  entries = guessed_at + shape.experts.layers * shape.spec.experts_per_token;
}

MissMailboxShape mailbox_shape(const DecodeGraphShape& shape) {
  return {shape.experts.layers, 1, shape.spec.hidden, shape.spec.experts_per_token, group_of(shape)};
}

DeviceRoom::DeviceRoom(Room& room, const DecodeGraphShape& shape) {
  const ModelSpec& spec = shape.spec;
  residual = room.take<float>(spec.hidden);
  qkv = room.take<float>((spec.heads + 2 * spec.kv_heads) * spec.head_dim);
  attended = room.take<float>(spec.heads * spec.head_dim);
  logits = room.take<float>(spec.vocab);
  inverse_frequencies = room.take<float>(spec.head_dim / 2);
  attention_workspace = room.take<std::byte>(static_cast<int64_t>(kernels::decode_attention_workspace_bytes(
      static_cast<int>(spec.heads), static_cast<int>(spec.kv_heads), static_cast<int>(spec.head_dim))));
  state = room.take<kernels::StepInput>(1);
  tables = room.take<int>(TableLayout(shape).entries);
  best = room.take<unsigned long long>(1);
  error = room.take<unsigned>(1);
  completed = room.take<unsigned>(1);
  const auto hidden = [&](WeightFormat format, int64_t values) {
    return room.take<std::byte>(values * (format == WeightFormat::bf16 ? 2 : 4));
  };
  const int64_t ffn = std::max(spec.dense_layers() > 0 ? spec.dense_ffn : 0, spec.shared_ffn);
  for (const auto encoding : {SliceEncoding::dense, SliceEncoding::int8, SliceEncoding::int4}) {
    if (std::count(shape.formats.shared.begin(), shape.formats.shared.end(), encoding) == 0) continue;
    const WeightFormat format = format_of(encoding);
    const bool whole = format == WeightFormat::bf16;  // one wide slice
    const int64_t width = whole ? ffn : shape.formats.slice_width;
    if (ffn > 0) fixed[static_cast<int>(format)] = hidden(format, (ffn + width - 1) / width * width);
  }
  if (shape.experts.layers == 0) return;
  const WeightFormat format = format_of(shape.encoding);
  const int64_t jobs = static_cast<int64_t>(spec.experts_per_token) * shape.experts.slices;
  const int64_t layers = shape.experts.layers;
  signals = room.take<kernels::LayerSignals>(layers);
  arrived = room.take<unsigned>(1);
  router_logits = room.take<float>(spec.experts);
  const int64_t shared_jobs = (spec.shared_ffn + shape.slice_width - 1) / shape.slice_width;
  routed = hidden(format, (shared_jobs + jobs) * shape.slice_width);
  resident = reinterpret_cast<kernels::JobList*>(
      room.take<std::byte>(static_cast<int64_t>(kernels::JobList::bytes(static_cast<int>(jobs)))));
  chosen = room.take<int>(layers * spec.experts_per_token);
  positions = room.take<int>(1);
  router_weights = room.take<float>(spec.experts);
  computed = room.take<unsigned char>(jobs);
  device_table = room.take<const std::byte*>(static_cast<int64_t>(shape.experts.total_slices()));
  if (shape.all_resident) return;
  times = room.take<kernels::LayerTimes>(layers);
  host_table = room.take<const std::byte*>(static_cast<int64_t>(shape.experts.total_slices()));
  from_host = hidden(format, jobs * shape.slice_width);
  zero_copy = reinterpret_cast<kernels::JobList*>(
      room.take<std::byte>(static_cast<int64_t>(kernels::JobList::bytes(static_cast<int>(jobs)))));
  fixed_sum = room.take<float>(spec.hidden);
  partials = room.take<float>(jobs * spec.hidden);
  if (!shape.fetches) return;
  slots = room.take<std::byte>(jobs * static_cast<int64_t>(shape.experts.slice_bytes));
  slot_arrived = room.take<unsigned>(jobs);
}

HostRoom::HostRoom(Room& room, const DecodeGraphShape& shape) {
  constexpr int slots = kStepsAtOnce;
  input = room.take<kernels::StepInput>(slots);
  output = room.take<kernels::StepOutput>(slots);
  tables = room.take<int>(slots * TableLayout(shape).entries);
  chosen = room.take<int>(slots * std::max(1, shape.experts.layers * shape.spec.experts_per_token));
  times = room.take<kernels::LayerTimes>(shape.all_resident ? 0 : slots * shape.experts.layers);
  mailbox = room.take<std::byte>(shape.with_workers || shape.fetches
                                     ? static_cast<int64_t>(MissMailbox::bytes(mailbox_shape(shape)))
                                     : 0);
  tags = room.take<unsigned>(shape.fetches ? shape.experts.layers : 0);
}

std::string why_no_decode_graph(const DecodeGraphShape& shape, bool cuda, DType dtype) {
  const ModelSpec& spec = shape.spec;
  if (!cuda) return "the device is no GPU";
  if (dtype != DType::bf16) return "the dtype is not bf16";
  if (spec.hidden > 8192) return "the hidden size of " + std::to_string(spec.hidden) + " is more than 8192";
  if (spec.head_dim != 64 && spec.head_dim != 128)
    return "heads of " + std::to_string(spec.head_dim) + " values";
  const int64_t group = spec.heads / spec.kv_heads;
  if (group != 1 && group != 2 && group != 4 && group != 5 && group != 8) {
    return std::to_string(group) + " query heads for one of the keys";
  }
  std::string why;
  const auto require = [&](SliceEncoding encoding, int64_t columns) {
    if (why.empty()) why = kernels::why_not_decodable(format_of(encoding), columns);
  };
  require(shape.formats.head, spec.hidden);
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    require(shape.formats.attention[i], spec.hidden);
    require(shape.formats.attention[i], spec.heads * spec.head_dim);
    require(shape.formats.shared[i], spec.hidden);
    if (shape.formats.shared[i] == SliceEncoding::dense) {
      require(SliceEncoding::dense, spec.layers[i].moe_layer < 0 ? spec.dense_ffn : spec.shared_ffn);
    }
  }
  require(shape.experts.layers > 0 ? shape.encoding : SliceEncoding::dense, spec.hidden);
  if (!why.empty()) return why;
  const bool slices = shape.experts.layers > 0 || shape.formats.any_packed();
  const int64_t width = shape.experts.layers > 0 ? shape.slice_width : shape.formats.slice_width;
  if (slices && width != 256 && width != 512 && width != 1024) {
    return "slices of width " + std::to_string(width) + "; set offload.slice_width to 256, 512 or 1024";
  }
  if (shape.experts.layers == 0) return {};
  if (spec.experts > kernels::kMostDecodeExperts) return std::to_string(spec.experts) + " experts in a layer";
  if (spec.experts_per_token > kernels::kMostChosen) {
    return std::to_string(spec.experts_per_token) + " experts for a token";
  }
  return {};
}

uint64_t decode_graph_device_bytes(const DecodeGraphShape& shape) {
  return counted_room<DeviceRoom>(shape);
}

uint64_t decode_graph_host_bytes(const DecodeGraphShape& shape) {
  return counted_room<HostRoom>(shape);
}

}  // namespace lighter::models
