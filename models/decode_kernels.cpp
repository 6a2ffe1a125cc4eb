#include "models/decode_kernels.h"

#include <algorithm>

#include "runtime/kernels/decode.h"
#include "runtime/kernels/decode_attention.h"
#include "runtime/step_number.h"

namespace lighter::models {
namespace {

using kernels::WeightFormat;

// Blocks of a kernel that read experts from host memory: enough for PCIe, and few enough to leave the GPU to
// the resident slices.
constexpr int kZeroCopyBlocks = 8;
// The same for what a copy engine brings: the last slice is read at the rate of GPU memory.
constexpr int kFetchedBlocks = 64;

// Of o's weights, brought into the second-level cache before attention. More keeps attention waiting; bf16
// gains nothing. Measured on an H100.
constexpr int64_t kFetchedForO = 4 << 20;
// What memory delivers while attention is computed. If o is less, it can begin with the experts.
constexpr int64_t kReadDuringAttention = 16 << 20;

class DecodeKernels {
 public:
  DecodeKernels(const DecodeKernelsInput& input, void* stream)
      : shape_(input.shape),
        spec_(input.shape.spec),
        weights_(input.weights),
        kv_(input.kv),
        on_device_(input.on_device),
        on_host_(input.on_host),
        context_(input.context),
        tables_(input.shape),
        scheduled_(input.scheduled),
        zero_copies_(input.zero_copies),
        mailbox_(input.mailbox),
        guesses_(input.guesses),
        guesses_told_(input.guesses_told),
        stream_(stream) {}

  void enqueue() {
    kernels::DecodeBegin begin;
    begin.input = on_host_.input;
    begin.completed = on_device_.completed;
    begin.slots = kStepsAtOnce;
    begin.state = on_device_.state;
    begin.hidden = spec_.hidden;
    begin.embedding = data(spec_.tied_head ? WeightRole::head : WeightRole::embedding);
    begin.residual = on_device_.residual;
    begin.tables_from = on_host_.tables;
    begin.tables_to = on_device_.tables;
    begin.table_entries = tables_.entries;
    begin.best = on_device_.best;
    begin.error = on_device_.error;
    begin.times = on_device_.times;
    begin.layers = shape_.experts.layers;
    kernels::decode_begin(begin, stream_);
    for (int layer = 0; layer < static_cast<int>(spec_.layers.size()); ++layer) {
      attention(layer);
      if (spec_.layers[layer].moe_layer < 0) {
        dense(layer);
      } else {
        experts(layer);
      }
    }
    auto head = linear(WeightRole::head, -1, spec_.vocab, spec_.hidden, on_device_.logits);
    head.normed = normed(WeightRole::final_norm);
    head.best = on_device_.best;
    kernels::decode_linear(head, stream_);
    kernels::DecodeEnd end;
    end.best = on_device_.best;
    end.error = on_device_.error;
    end.state = on_device_.state;
    end.out = on_host_.output;
    end.completed = on_device_.completed;
    end.slots = kStepsAtOnce;
    end.signals = on_device_.signals;
    end.layers = shape_.experts.layers;
    end.chosen_from = on_device_.chosen;
    end.chosen_to = on_host_.chosen;
    end.chosen = shape_.experts.layers * spec_.experts_per_token;
    end.times_from = on_device_.times;
    end.times_to = on_host_.times;
    kernels::decode_end(end, stream_);
  }

 private:
  const std::byte* data(WeightRole role, int layer = -1) const {
    return static_cast<const std::byte*>(weights_.at(role, layer).const_data_ptr());
  }
  kernels::NormedInput normed(WeightRole role, int layer = -1) const {
    return {on_device_.residual, data(role, layer), static_cast<float>(spec_.norm_eps)};
  }
  kernels::DecodeLinear linear(WeightRole role, int layer, int64_t rows, int64_t columns, float* out) const {
    kernels::DecodeLinear linear;
    linear.rows = rows;
    linear.columns = columns;
    linear.out = out;
    if (const PackedWeight* const packed = weights_.packed(role, layer)) {
      const PackedMatrix matrix = packed->matrix();
      linear.format = format_of(packed->encoding);
      linear.weights = packed->data + matrix.values_at;
      linear.scales = packed->data + matrix.scales_at;
      linear.minimums = packed->data + matrix.minimums_at;
    } else {
      linear.weights = data(role, layer);
    }
    return linear;
  }

  void attention(int layer) {
    const LayerSpec& kind = spec_.layers[layer];
    const int64_t q = spec_.heads * spec_.head_dim;
    auto qkv =
        linear(WeightRole::qkv, layer, q + 2 * spec_.kv_heads * spec_.head_dim, spec_.hidden, on_device_.qkv);
    qkv.normed = normed(WeightRole::attention_norm, layer);
    qkv.idle_before = !shape_.all_resident;  // the layer before waits for what is missed
    qkv.after_small = qkv.late_next = true;
    // During attention memory has little to do.
    if (const PackedWeight* const packed = weights_.packed(WeightRole::o, layer)) {
      qkv.next = packed->data;
      qkv.next_bytes = static_cast<int64_t>(packed->bytes());
      if (!qkv.idle_before) qkv.next_bytes = std::min(qkv.next_bytes, kFetchedForO);
    } else if (qkv.idle_before) {
      qkv.next = data(WeightRole::o, layer);
      qkv.next_bytes = spec_.hidden * q * 2;
    }
    kernels::decode_linear(qkv, stream_);
    kernels::DecodeAttention a;
    a.qkv = on_device_.qkv;
    a.position = on_device_.state->positions;
    a.keys = kv_.key_data(layer);
    a.values = kv_.value_data(layer);
    a.block_table = on_device_.tables + (kind.chunked ? tables_.blocks[0] : 0);
    a.block = static_cast<int>(shape_.kv_block);
    a.window = kind.chunked ? spec_.attention_chunk : 0;
    a.heads = static_cast<int>(spec_.heads);
    a.kv_heads = static_cast<int>(spec_.kv_heads);
    a.head_dim = static_cast<int>(spec_.head_dim);
    a.rope = kind.rope;
    a.interleaved = spec_.rope.interleaved;
    a.inverse_frequencies = on_device_.inverse_frequencies;
    a.qk_norm = kind.qk_norm;
    a.eps = static_cast<float>(spec_.norm_eps);
    a.temperature_scale = kind.temperature ? static_cast<float>(spec_.attention_scale) : 0.0f;
    a.floor_scale = static_cast<float>(spec_.floor_scale);
    a.context = context_;
    a.workspace = on_device_.attention_workspace;
    a.out = on_device_.attended;
    kernels::decode_attention(a, stream_);
    auto o = linear(WeightRole::o, layer, spec_.hidden, q, on_device_.residual);
    o.x = on_device_.attended;
    o.add = true;
    o.after_small = true;
    o.late_next = !shape_.all_resident;
    const PackedWeight* const packed_o = weights_.packed(WeightRole::o, layer);
    if (shape_.all_resident && packed_o != nullptr && packed_o->bytes() <= kReadDuringAttention) {
      o.first_pairs = first_pairs(layer);
    }
    kernels::decode_linear(o, stream_);
  }

  // A network that every token passes: packed slices, or bf16 as one wide slice whose down matrix lies apart.
  struct FixedFfn {
    WeightFormat format = WeightFormat::bf16;
    const std::byte* slices = nullptr;
    int count = 0;  // 0: there is none
    int64_t width = 0;
    const std::byte* down = nullptr;  // of bf16
  };
  FixedFfn fixed_ffn(int layer) const {
    const bool moe = spec_.layers[layer].moe_layer >= 0;
    const int64_t ffn = moe ? spec_.shared_ffn : spec_.dense_ffn;
    if (ffn == 0) return {};
    const WeightRole gate_up = moe ? WeightRole::shared_gate_up : WeightRole::dense_gate_up;
    if (const PackedWeight* const packed = weights_.packed(gate_up, layer)) {
      return {format_of(packed->encoding), packed->data, static_cast<int>(packed->slices),
              packed->slice_width, nullptr};
    }
    return {WeightFormat::bf16, data(gate_up, layer), 1, ffn,
            data(moe ? WeightRole::shared_down : WeightRole::dense_down, layer)};
  }
  kernels::DecodeGateUp gate_up_of(const FixedFfn& ffn, int layer) const {
    kernels::DecodeGateUp g;
    g.format = ffn.format;
    g.hidden = spec_.hidden;
    g.width = ffn.width;
    g.input = normed(WeightRole::ffn_norm, layer);
    g.fixed = ffn.slices;
    g.fixed_jobs = ffn.count;
    g.out = on_device_.fixed[static_cast<int>(ffn.format)];
    return g;
  }
  // residual: out += its result; else out becomes it.
  void down_of(const FixedFfn& ffn, float* out, bool residual) const {
    const std::byte* const hidden = on_device_.fixed[static_cast<int>(ffn.format)];
    if (ffn.down != nullptr) {
      kernels::DecodeLinear down;
      down.rows = spec_.hidden;
      down.columns = ffn.width;
      down.weights = ffn.down;
      down.x_bf16 = hidden;
      down.out = out;
      down.add = residual;
      kernels::decode_linear(down, stream_);
      return;
    }
    kernels::DecodeDown down;
    down.format = ffn.format;
    down.hidden = spec_.hidden;
    down.width = ffn.width;
    down.fixed = ffn.slices;
    down.fixed_jobs = ffn.count;
    down.hidden_activations = hidden;
    (residual ? down.residual : down.fixed_sum) = out;
    kernels::decode_down(down, stream_);
  }

  void dense(int layer) {
    const FixedFfn ffn = fixed_ffn(layer);
    kernels::decode_gate_up(gate_up_of(ffn, layer), stream_);
    down_of(ffn, on_device_.residual, true);
  }

  kernels::DecodeRouter router(int layer) const {
    const int moe_layer = spec_.layers[layer].moe_layer;
    const size_t first = shape_.experts.index({moe_layer, 0, 0});
    kernels::DecodeRouter r;
    r.experts = spec_.experts;
    r.k = spec_.experts_per_token;
    r.slices = shape_.experts.slices;
    r.hidden = spec_.hidden;
    r.score = spec_.router == RouterKind::sigmoid ? kernels::RouterScore::sigmoid
                                                  : kernels::RouterScore::softmax_normalised;
    r.weight = data(WeightRole::router, layer);
    if (scheduled_) r.forced = on_device_.tables + tables_.forced_at + moe_layer * spec_.experts_per_token;
    r.input = normed(WeightRole::ffn_norm, layer);
    r.device_table = on_device_.device_table + first;
    r.groups_per_slice = groups_per_slice(shape_);
    r.resident = on_device_.resident;
    r.logits = on_device_.router_logits;
    r.arrived = on_device_.arrived;
    r.chosen = on_device_.chosen + moe_layer * spec_.experts_per_token;
    r.weights = on_device_.router_weights;
    r.step = &on_device_.state->step;
    if (shape_.all_resident) return r;
    r.host_table = on_device_.host_table + first;
    r.times = times_of(layer);
    if (zero_copies_) r.zero_copy = on_device_.zero_copy;
    r.arrivals = arrivals(layer);
    r.zero_copy_share = &on_device_.state->zero_copy_share;
    r.computed = on_device_.computed;
    r.positions = on_device_.positions;
    if (mailbox_ != nullptr) {
      const MissSlot slot = mailbox_->slot(moe_layer);
      const int group = static_cast<int>(mailbox_->shape().group);
      r.post = {slot.x, slot.x_scales, slot.factors, group, slot.experts, slot.weights, slot.posted};
      if (shape_.fetches) {
        r.post.x = nullptr;
        r.post.x_scales = r.post.factors = nullptr;
      }
      if (guesses_) r.guess = guess(layer);
    }
    return r;
  }
  // In this layer, of the next one with experts.
  kernels::RoutingGuess guess(int layer) const {
    kernels::RoutingGuess g;
    const auto next = std::find_if(spec_.layers.begin() + layer + 1, spec_.layers.end(),
                                   [](const LayerSpec& coming) { return coming.moe_layer >= 0; });
    if (next == spec_.layers.end()) return g;
    const int at = static_cast<int>(next - spec_.layers.begin());
    g.weight = data(WeightRole::router, at);
    g.norm = data(WeightRole::ffn_norm, at);
    if (guesses_told_) {
      g.forced = on_device_.tables + tables_.guessed_at + next->moe_layer * spec_.experts_per_token;
    }
    const MissSlot slot = mailbox_->slot(next->moe_layer);
    g.experts = slot.expected;
    g.posted = slot.guessed;
    return g;
  }

  // Of the missed slices' kernels.
  int host_blocks() const { return shape_.fetches ? kFetchedBlocks : kZeroCopyBlocks; }
  kernels::Arrivals arrivals(int layer) const {
    kernels::Arrivals a;
    if (!shape_.fetches) return a;
    a.slots = on_device_.slots;
    a.slot_bytes = static_cast<int64_t>(shape_.experts.slice_bytes);
    a.arrived = on_device_.slot_arrived;
    a.step = &on_device_.state->step;
    a.error = on_device_.error;
    a.layer = layer;
    a.moe_layer = spec_.layers[layer].moe_layer;
    a.moe_layers = shape_.experts.layers;
    return a;
  }
  kernels::DecodeGateUp routed_gate_up(int layer) const {
    kernels::DecodeGateUp g;
    g.format = format_of(shape_.encoding);
    g.hidden = spec_.hidden;
    g.width = shape_.slice_width;
    g.input = normed(WeightRole::ffn_norm, layer);
    g.list = on_device_.resident;
    g.input_weights = spec_.weight_on == WeightOn::input ? on_device_.router_weights : nullptr;
    g.out = on_device_.routed;
    if (zero_copies_) {
      g.host_list = on_device_.zero_copy;
      g.host_out = on_device_.from_host;
      g.host_blocks = host_blocks();
      g.arrivals = arrivals(layer);
    }
    return g;
  }
  kernels::DecodeDown routed_down() const {
    kernels::DecodeDown d;
    d.format = format_of(shape_.encoding);
    d.hidden = spec_.hidden;
    d.width = shape_.slice_width;
    d.list = on_device_.resident;
    d.most_list_jobs = spec_.experts_per_token * shape_.experts.slices;
    d.output_weights = spec_.weight_on == WeightOn::output ? on_device_.router_weights : nullptr;
    d.experts = spec_.experts;
    d.hidden_activations = on_device_.routed;
    if (zero_copies_) {
      d.host_list = on_device_.zero_copy;
      d.host_activations = on_device_.from_host;
      d.host_blocks = host_blocks();
      d.host_arrives = shape_.fetches;
    }
    return d;
  }

  // Of the network that every token passes; none if it is not packed.
  kernels::FirstPairs first_pairs(int layer) const {
    const FixedFfn ffn = fixed_ffn(layer);
    if (ffn.count == 0 || ffn.down != nullptr) return {};
    auto gate_up = gate_up_of(ffn, layer);
    kernels::DecodeRouter routing;
    if (spec_.layers[layer].moe_layer >= 0) {
      routing = router(layer);
      gate_up.router = &routing;
    }
    return kernels::first_pairs(gate_up);
  }

  // Null: all experts are resident.
  kernels::LayerTimes* times_of(int layer) const {
    return on_device_.times == nullptr ? nullptr : on_device_.times + spec_.layers[layer].moe_layer;
  }

  // The routing runs beside the shared experts, which do not need it. Shared and routed ones share their
  // launches where they are made alike.
  void experts(int layer) {
    const FixedFfn shared = fixed_ffn(layer);
    const auto routing = router(layer);
    auto gate_up = routed_gate_up(layer);
    auto down = routed_down();
    const bool alike =
        shared.down == nullptr && shared.format == gate_up.format && shared.width == gate_up.width;
    const bool apart = shared.count > 0 && !alike;
    if (shared.count > 0 && alike) {
      gate_up.fixed = down.fixed = shared.slices;
      gate_up.fixed_jobs = down.fixed_jobs = shared.count;
    }
    gate_up.times = down.times = times_of(layer);
    auto first = apart ? gate_up_of(shared, layer) : gate_up;
    first.router = &routing;
    first.signals = gate_up.signals = on_device_.signals + spec_.layers[layer].moe_layer;
    down.signals = first.signals;
    kernels::decode_gate_up(first, stream_);
    if (apart) {
      kernels::decode_gate_up(gate_up, stream_);
      down_of(shared, shape_.all_resident ? on_device_.residual : on_device_.fixed_sum, shape_.all_resident);
    }
    if (shape_.all_resident) {
      down.residual = on_device_.residual;
      kernels::decode_down(down, stream_);
      return;
    }
    if (down.fixed_jobs > 0) down.fixed_sum = on_device_.fixed_sum;
    down.partials = on_device_.partials;
    kernels::decode_down(down, stream_);
    kernels::DecodeCombine combine;
    combine.hidden = spec_.hidden;
    combine.fixed_sum = shared.count > 0 ? on_device_.fixed_sum : nullptr;
    combine.partials = on_device_.partials;
    combine.computed = on_device_.computed;
    combine.positions = on_device_.positions;
    if (mailbox_ != nullptr && !shape_.fetches) {
      const MissSlot slot = mailbox_->slot(spec_.layers[layer].moe_layer);
      combine.from_cpu = slot.result;
      combine.cpu_ending = slot.ending;
      combine.signals = first.signals;
    }
    combine.step = &on_device_.state->step;
    combine.error = on_device_.error;
    combine.layer = layer;
    combine.residual = on_device_.residual;
    combine.times = times_of(layer);
    kernels::decode_combine(combine, stream_);
  }

  const DecodeGraphShape& shape_;
  const ModelSpec& spec_;
  const LoadedWeights& weights_;
  const KvCache& kv_;
  const DeviceRoom& on_device_;
  const HostRoom& on_host_;
  const int64_t context_;
  const TableLayout tables_;
  const bool scheduled_, zero_copies_;
  const MissMailbox* const mailbox_;
  const bool guesses_, guesses_told_;
  void* const stream_;
};

}  // namespace

void enqueue_decode_kernels(const DecodeKernelsInput& input, void* stream) {
  DecodeKernels(input, stream).enqueue();
}

}  // namespace lighter::models
