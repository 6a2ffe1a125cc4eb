#include "models/model_quantizer.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>

#include "models/linear.h"
#include "models/moe_block.h"
#include "runtime/error.h"
#include "runtime/moe/swiglu.h"
#include "runtime/torch/tensors.h"

namespace lighter::models {
namespace {

constexpr int64_t kRowsAtOnce = 4096;  // of activations

// Calls body(first, count) for some rows after others; once if there are none.
template <typename Body>
void for_rows(int64_t rows, const Body& body) {
  int64_t first = 0;
  do {
    body(first, std::min(kRowsAtOnce, rows - first));
    first += kRowsAtOnce;
  } while (first < rows);
}
// What body(rows of x) returns, put together again.
template <typename Body>
at::Tensor by_rows(const at::Tensor& x, const Body& body) {
  std::vector<at::Tensor> parts;
  for_rows(x.size(0),
           [&](int64_t first, int64_t count) { parts.push_back(body(x.narrow(0, first, count))); });
  return parts.size() == 1 ? parts[0] : at::cat(parts);
}

Moments moments_of(const at::Tensor& exact, const at::Tensor& rounded) {
  Moments moments(rounded.size(1), rounded.device());
  moments.add(exact, rounded);
  return moments;
}

int64_t widest_ffn(const ModelSpec& spec) {
  return std::max({spec.dense_layers() > 0 ? spec.dense_ffn : 0, spec.shared_ffn, spec.expert_ffn});
}

// What a feed-forward network's down matrix is multiplied with, and its output.
at::Tensor hidden_values(const at::Tensor& gate_up, const at::Tensor& x) {
  return gated(at::mm(x, gate_up.t()));
}
at::Tensor through(const at::Tensor& gate_up, const at::Tensor& down, const at::Tensor& x) {
  return by_rows(x, [&](const at::Tensor& rows) { return at::mm(hidden_values(gate_up, rows), down.t()); });
}

struct RowPart {
  int64_t row = 0, first = 0, columns = 0;  // columns from `first` on
};
void copy_row_part(const PackedRows& from, const RowPart& part, const PackedMatrix& to, int64_t to_row,
                   std::byte* slice) {
  const auto copy = [&](uint64_t from_at, uint64_t to_at, const auto& bytes) {
    std::memcpy(slice + to_at + bytes(to_row * to.columns),
                from.bytes.data() + from_at + bytes(part.row * from.form.columns + part.first),
                bytes(part.columns));
  };
  const auto scale_bytes = [&](int64_t values) { return values / group_size(from.encoding) * 2; };
  copy(from.form.values_at, to.values_at, [&](int64_t values) { return value_bytes(from.encoding, values); });
  copy(from.form.scales_at, to.scales_at, scale_bytes);
  if (from.encoding == SliceEncoding::int4) copy(from.form.minimums_at, to.minimums_at, scale_bytes);
}

// gate_up [2 · ffn, hidden] and down [hidden, ffn] as slices, one after the other.
std::vector<std::byte> slices_of(const PackedRows& gate_up, const PackedRows& down, int64_t width) {
  const int64_t hidden = down.form.rows, ffn = down.form.columns;
  const PackedSliceLayout layout = packed_slice_layout(down.encoding, hidden, width);
  std::vector<std::byte> slices(layout.bytes * static_cast<uint64_t>(ffn / width));
  for (int64_t s = 0; s < ffn / width; ++s) {
    std::byte* const slice = slices.data() + static_cast<uint64_t>(s) * layout.bytes;
    for (int64_t i = 0; i < width; ++i) {
      copy_row_part(gate_up, {s * width + i, 0, hidden}, layout[SliceMatrix::gate], i, slice);
      copy_row_part(gate_up, {ffn + s * width + i, 0, hidden}, layout[SliceMatrix::up], i, slice);
    }
    for (int64_t row = 0; row < hidden; ++row) {
      copy_row_part(down, {row, s * width, width}, layout[SliceMatrix::down], row, slice);
    }
  }
  return slices;
}

}  // namespace

ModelQuantizer::ModelQuantizer(const ModelSpec& spec, const CheckpointSource& source, LoadedWeights& weights,
                               KvCache& kv, Device& device, DType dtype, const StoredFormats& formats,
                               std::span<std::byte> expert_room)
    : spec_(spec),
      source_(source),
      weights_(weights),
      kv_(kv),
      device_(device),
      dtype_(dtype),
      formats_(formats),
      expert_room_(expert_room),
      all_(list_weights(spec)),
      attention_(spec, weights, kv, device, dtype) {}

uint64_t ModelQuantizer::expert_bytes(const ModelSpec& spec, DType dtype) {
  return static_cast<uint64_t>(3 * spec.hidden * spec.expert_ffn) * dtype_size(dtype);
}

uint64_t ModelQuantizer::device_bytes(const ModelSpec& spec, DType dtype, int64_t tokens) {
  const uint64_t element = dtype_size(dtype);
  const uint64_t hidden = spec.hidden, q = spec.heads * spec.head_dim;
  const uint64_t ffn = widest_ffn(spec);
  const uint64_t widest = std::max({hidden, q, ffn});
  // Residual stream, normed, heads or an expert's rows and what it makes of them, and sums in fp32; routing:
  // of the model as it is and of the rounded one.
  const uint64_t rows = 2 * tokens * (hidden * (5 * element + 4) + q * element + spec.experts * 8 + 256);
  const uint64_t moments = 12 * 8 * widest * widest;
  const uint64_t matrix = 3 * 4 * uint64_t{8192} * widest + expert_bytes(spec, dtype);
  const uint64_t step = kRowsAtOnce * (3 * ffn + 2 * hidden) * (element + 4);
  return (rows + moments + matrix + step) * 9 / 8;
}

uint64_t ModelQuantizer::host_bytes(const ModelSpec& spec) {
  const uint64_t hidden = spec.hidden, q = spec.heads * spec.head_dim;
  const uint64_t ffn = widest_ffn(spec);
  // A network packed, and again in slices, or the head; a block of rows in fp32; the writer's buffer.
  const uint64_t packed = std::max(2 * 3 * hidden * ffn, static_cast<uint64_t>(spec.vocab) * hidden);
  return packed * 9 / 8 + 4 * uint64_t{8192} * (std::max({hidden, q, ffn}) + 128) + (uint64_t{16} << 20);
}

const Weight& ModelQuantizer::find(WeightRole role, int layer) const {
  return *std::ranges::find_if(all_, [&](const Weight& w) { return w.role == role && w.layer == layer; });
}

void ModelQuantizer::done(uint64_t bytes) {
  done_bytes_ += bytes;
  (*progress_)("quantizing", done_bytes_, total_bytes_);
}

at::Tensor ModelQuantizer::embed_texts(const std::vector<std::vector<int64_t>>& texts) const {
  if (texts.empty()) return at::empty({0, spec_.hidden}, weights_.at(WeightRole::ffn_norm, 0).options());
  std::vector<at::Tensor> parts;
  for (const auto& ids : texts) parts.push_back(embed(weights_, spec_, ids, dtype_));
  return at::cat(parts);
}

at::Tensor ModelQuantizer::attend(int layer, const at::Tensor& normed,
                                  const std::vector<std::vector<int64_t>>& texts, int64_t chunk) {
  if (texts.empty()) return at::empty({0, spec_.heads * spec_.head_dim}, normed.options());
  std::vector<at::Tensor> parts;
  int64_t before = 0;
  for (const auto& ids : texts) {
    kv_.release(0);
    const auto length = static_cast<int64_t>(ids.size());
    for (int64_t begin = 0; begin < length;) {
      const int64_t count = std::min({chunk, kv_.shape().max_tokens_from(begin), length - begin});
      Step step;
      step.add(0, begin, ids.data() + begin, count);
      const KvCache::StepIndex index = kv_.index(step);
      parts.push_back(attention_.heads(layer, normed.narrow(0, before + begin, count),
                                       attention_.begin_step(step, index)));
      begin += count;
    }
    before += length;
  }
  kv_.release(0);
  return at::cat(parts);
}

void ModelQuantizer::quantize(const Weight& weight, const Both& inputs) {
  const SliceEncoding encoding = formats_.weights.of(weight);
  if (encoding == SliceEncoding::dense) return;
  const at::Tensor& values = weights_.at(weight.role, weight.layer);
  const Moments moments =
      encoding == SliceEncoding::int4 ? moments_of(inputs.exact, inputs.rounded) : Moments();
  const PackedRows packed = quantize_matrix(encoding, values, moments, weight.parts.front().name);
  writer_->put(weight, packed.bytes.data(), packed.bytes.size());
  dequantize_into(packed, values);
  done(static_cast<uint64_t>(weight.elements()) * dtype_size(dtype_));
}

template <typename Put>
at::Tensor ModelQuantizer::through_ffn(const Ffn& ffn, const Both& x, const Put& put) {
  if (ffn.encoding != SliceEncoding::dense) {
    const bool calibrated = ffn.encoding == SliceEncoding::int4;
    const at::Tensor exact_gate_up = calibrated ? ffn.gate_up.clone() : at::Tensor();
    const PackedRows gate_up =
        quantize_matrix(ffn.encoding, ffn.gate_up, calibrated ? moments_of(x.exact, x.rounded) : Moments(),
                        ffn.name + ", gate and up");
    dequantize_into(gate_up, ffn.gate_up);
    Moments moments;
    if (calibrated) {
      moments = Moments(ffn.down.size(1), x.rounded.device());
      for_rows(x.rounded.size(0), [&](int64_t first, int64_t count) {
        moments.add(hidden_values(exact_gate_up, x.exact.narrow(0, first, count)),
                    hidden_values(ffn.gate_up, x.rounded.narrow(0, first, count)));
      });
    }
    const PackedRows down = quantize_matrix(ffn.encoding, ffn.down, moments, ffn.name + ", down");
    dequantize_into(down, ffn.down);
    const std::vector<std::byte> slices = slices_of(gate_up, down, ffn.slice_width);
    put(slices.data(), slices.size());
    done(static_cast<uint64_t>(ffn.gate_up.numel() + ffn.down.numel()) * dtype_size(dtype_));
  }
  if (x.rounded.size(0) == 0) return at::empty_like(x.rounded);
  return through(ffn.gate_up, ffn.down, x.rounded);
}

ModelQuantizer::Both ModelQuantizer::dense(const Weight& gate_up, const Both& x) {
  const WeightRole down =
      gate_up.role == WeightRole::shared_gate_up ? WeightRole::shared_down : WeightRole::dense_down;
  Ffn ffn{weights_.at(gate_up.role, gate_up.layer), weights_.at(down, gate_up.layer),
          formats_.weights.of(gate_up), 0, gate_up.parts.front().name};
  if (ffn.encoding != SliceEncoding::dense)
    ffn.slice_width = packed_form(formats_.weights, gate_up).slice_width;
  const at::Tensor exact = through(ffn.gate_up, ffn.down, x.exact);
  return {exact, through_ffn(ffn, x, [&](const std::byte* slices, uint64_t bytes) {
            writer_->put(gate_up, slices, bytes);
          })};
}

ModelQuantizer::Both ModelQuantizer::moe(int layer, const Both& x) {
  const auto route_text = [&](const at::Tensor& rows) {
    return route(spec_.router, at::mm(rows, weights_.at(WeightRole::router, layer).t()),
                 spec_.experts_per_token, {});
  };
  const Routing routing = route_text(x.rounded), exact_routing = route_text(x.exact);
  Both out;
  if (spec_.shared_ffn > 0) {
    const Both shared = dense(find(WeightRole::shared_gate_up, layer), x);
    out = {shared.exact.to(at::kFloat), shared.rounded.to(at::kFloat)};
  } else {
    out = {at::zeros(x.exact.sizes(), x.exact.options().dtype(at::kFloat)),
           at::zeros(x.rounded.sizes(), x.rounded.options().dtype(at::kFloat))};
  }
  if (x.rounded.size(0) == 0 && formats_.experts == SliceEncoding::dense) return x;
  const int64_t hidden = spec_.hidden, ffn_width = spec_.expert_ffn;
  for (int expert = 0; expert < spec_.experts; ++expert) {
    std::byte* const room = expert_room_.data();
    source_.read_expert({spec_.layers[layer].moe_layer, expert}, {&room, 1});
    const auto on_device = [&](const std::byte* at, int64_t rows, int64_t columns) {
      return host_view_of(at, {rows, columns}, dtype_).to(torch_device(device_));
    };
    const Ffn ffn{on_device(room, 2 * ffn_width, hidden),
                  on_device(room + 2 * ffn_width * hidden * static_cast<int64_t>(dtype_size(dtype_)), hidden,
                            ffn_width),
                  formats_.experts, formats_.weights.slice_width,
                  "layer " + std::to_string(layer) + ", expert " + std::to_string(expert)};
    struct Chosen {
      at::Tensor rows, weights;
    };
    const auto chosen_by = [&](const Routing& by) {
      const at::Tensor chosen = by.experts.eq(expert);
      return Chosen{chosen.nonzero().select(1, 0), by.weights.masked_select(chosen).unsqueeze(1)};
    };
    const auto inputs_of = [&](const at::Tensor& of, const Chosen& chosen) {
      const at::Tensor inputs = of.index_select(0, chosen.rows);
      return spec_.weight_on == WeightOn::input ? inputs.mul(chosen.weights).to(of.scalar_type()) : inputs;
    };
    const auto add = [&](at::Tensor outputs, const Chosen& chosen, at::Tensor& to) {
      if (spec_.weight_on == WeightOn::output) outputs = outputs.mul(chosen.weights);
      to.index_add_(0, chosen.rows, outputs.to(at::kFloat));
    };
    const Chosen exact = chosen_by(exact_routing), rounded = chosen_by(routing);
    if (rounded.rows.size(0) < hidden) ++experts_short_of_text_;
    if (exact.rows.size(0) > 0)
      add(through(ffn.gate_up, ffn.down, inputs_of(x.exact, exact)), exact, out.exact);
    const Both inputs{inputs_of(x.exact, rounded), inputs_of(x.rounded, rounded)};
    add(through_ffn(ffn, inputs,
                    [&](const std::byte* slices, uint64_t bytes) { writer_->put_expert(slices, bytes); }),
        rounded, out.rounded);
  }
  return {out.exact.to(x.exact.scalar_type()), out.rounded.to(x.rounded.scalar_type())};
}

void ModelQuantizer::run(const std::vector<std::vector<int64_t>>& texts, int64_t chunk,
                         PackedFolderWriter& writer, const Progress& progress) {
  writer_ = &writer;
  progress_ = &progress;
  done_bytes_ = 0;
  total_bytes_ = writer.copied_bytes();
  experts_short_of_text_ = 0;
  for (const Weight& weight : all_) {
    if (formats_.weights.of(weight) == SliceEncoding::dense) continue;
    total_bytes_ += static_cast<uint64_t>(weight.elements()) * dtype_size(dtype_);
  }
  if (formats_.experts != SliceEncoding::dense) {
    total_bytes_ += static_cast<uint64_t>(spec_.moe_layers()) * spec_.experts * expert_bytes(spec_, dtype_);
  }
  const auto normed = [&](const at::Tensor& x, WeightRole role, int layer) {
    return by_rows(
        x, [&](const at::Tensor& rows) { return rms_norm(rows, weights_.at(role, layer), spec_.norm_eps); });
  };
  const auto both_normed = [&](const Both& x, WeightRole role, int layer) {
    return Both{normed(x.exact, role, layer), normed(x.rounded, role, layer)};
  };
  const auto o_of = [&](const at::Tensor& heads, int layer) {
    return by_rows(heads,
                   [&](const at::Tensor& rows) { return linear(rows, weights_, WeightRole::o, layer); });
  };
  Both x;
  x.exact = embed_texts(texts);
  x.rounded = x.exact.clone();
  for (int layer = 0; layer < static_cast<int>(spec_.layers.size()); ++layer) {
    writer.begin(layer);
    Both inputs = both_normed(x, WeightRole::attention_norm, layer);
    Both heads;
    heads.exact = attend(layer, inputs.exact, texts, chunk);
    quantize(find(WeightRole::qkv, layer), inputs);
    heads.rounded = attend(layer, inputs.rounded, texts, chunk);
    x.exact.add_(o_of(heads.exact, layer));
    quantize(find(WeightRole::o, layer), heads);
    x.rounded.add_(o_of(heads.rounded, layer));
    inputs = both_normed(x, WeightRole::ffn_norm, layer);
    const Both out = spec_.layers[layer].moe_layer >= 0
                         ? moe(layer, inputs)
                         : dense(find(WeightRole::dense_gate_up, layer), inputs);
    x.exact.add_(out.exact);
    x.rounded.add_(out.rounded);
    writer.end([&](uint64_t bytes) { done(bytes); });
  }
  writer.begin(-1);
  const Weight& head = find(WeightRole::head, -1);
  if (formats_.weights.of(head) != SliceEncoding::dense)
    quantize(head, both_normed(x, WeightRole::final_norm, -1));
  writer.end([&](uint64_t bytes) { done(bytes); });
}

}  // namespace lighter::models
