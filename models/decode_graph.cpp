#include "models/decode_graph.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <span>

#include "models/rope.h"
#include "runtime/error.h"
#include "runtime/kernels/decode.h"
#include "runtime/kernels/decode_attention.h"
#include "runtime/moe/share_control.h"
#include "runtime/torch/tensors.h"

namespace lighter::models {
namespace {

using kernels::WeightFormat;

constexpr int kSequence = 0;
// Blocks of a kernel that read experts from host memory: enough for PCIe, and few enough to leave the GPU to
// the resident slices.
constexpr int kZeroCopyBlocks = 32;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw DeviceError(std::string("the decode graph: ") + what + ": " + cudaGetErrorString(error));
}

WeightFormat format_of(SliceEncoding encoding) {
  if (encoding == SliceEncoding::int8) return WeightFormat::int8;
  return encoding == SliceEncoding::int4 ? WeightFormat::int4 : WeightFormat::bf16;
}

int64_t group_of(WeightFormat format) {
  return format == WeightFormat::int8 ? 128 : 64;
}

bool any_layer(const ModelSpec& spec, bool chunked) {
  return std::any_of(spec.layers.begin(), spec.layers.end(),
                     [&](const LayerSpec& layer) { return layer.chunked == chunked; });
}

// How the ints that a step is told lie: block tables of both groups, then scheduled experts.
struct TableLayout {
  int blocks[2] = {};
  int forced_at = 0;
  int entries = 0;

  explicit TableLayout(const DecodeGraphShape& shape) {
    for (const bool chunked : {false, true}) {
      if (!any_layer(shape.spec, chunked)) continue;
      const int64_t positions = chunked ? std::min(shape.spec.attention_chunk, shape.context) : shape.context;
      blocks[chunked] = static_cast<int>((positions + shape.kv_block - 1) / shape.kv_block);
    }
    forced_at = blocks[0] + blocks[1];
    entries = forced_at + shape.experts.layers * shape.spec.experts_per_token;
  }
};

MissMailboxShape mailbox_shape(const DecodeGraphShape& shape) {
  return {shape.experts.layers, 1, shape.spec.hidden, shape.spec.experts_per_token};
}

// Room in one allocation; with no base it only counts.
class Room {
 public:
  explicit Room(std::byte* base) : base_(base) {}
  template <typename T>
  T* take(int64_t count) {
    const uint64_t at = used_;
    used_ += (static_cast<uint64_t>(count) * sizeof(T) + 255) / 256 * 256;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }
  uint64_t used() const { return used_; }

 private:
  std::byte* base_;
  uint64_t used_ = 0;
};

struct DeviceRoom {
  float *residual, *qkv, *attended, *logits, *inverse_frequencies;
  std::byte* attention_workspace;
  kernels::StepInput* state;
  int* tables;
  unsigned long long* best;
  unsigned *error, *late, *ready, *arrived;
  float* router_logits;
  // Hidden activations, as the kernels take them.
  std::byte* fixed[3] = {};  // by format, of networks that every token passes
  std::byte *routed, *from_host;
  kernels::JobList *resident, *zero_copy;
  int *chosen, *positions;
  float *router_weights, *fixed_sum, *partials;
  unsigned char* computed;
  kernels::LayerTimes* times = nullptr;  // of all resident ones nothing is timed
  const std::byte **device_table, **host_table;

  DeviceRoom(Room& room, const DecodeGraphShape& shape) {
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
    late = room.take<unsigned>(1);
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
    ready = room.take<unsigned>(layers);
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
  }
};

struct HostRoom {
  kernels::StepInput* input;
  kernels::StepOutput* output;
  int *tables, *chosen;
  kernels::LayerTimes* times;
  std::byte* mailbox;

  HostRoom(Room& room, const DecodeGraphShape& shape) {
    input = room.take<kernels::StepInput>(1);
    output = room.take<kernels::StepOutput>(1);
    tables = room.take<int>(TableLayout(shape).entries);
    chosen = room.take<int>(std::max(1, shape.experts.layers * shape.spec.experts_per_token));
    times = room.take<kernels::LayerTimes>(shape.all_resident ? 0 : shape.experts.layers);
    mailbox = room.take<std::byte>(
        shape.with_workers ? static_cast<int64_t>(MissMailbox::bytes(mailbox_shape(shape))) : 0);
  }
};

template <typename Kind>
uint64_t counted(const DecodeGraphShape& shape) {
  Room room(nullptr);
  Kind kind(room, shape);
  return room.used();
}

class CudaDecodeGraph : public DecodeGraph {
 public:
  CudaDecodeGraph(const DecodeGraphShape& shape, const LoadedWeights& weights, KvCache& kv,
                  ExpertExecutor* executor, const RoutingSchedule& schedule, const MissSharing& sharing,
                  Device& device)
      : shape_(shape),
        spec_(shape.spec),
        weights_(weights),
        kv_(kv),
        executor_(executor),
        schedule_(schedule),
        device_(device),
        tables_(shape),
        device_memory_(device.allocate(counted<DeviceRoom>(shape), "the decode step")),
        host_memory_(device.allocate_host(counted<HostRoom>(shape), "the decode step's input")),
        on_device_([&] {
          Room room(device_memory_.data());
          return DeviceRoom(room, shape);
        }()),
        on_host_([&] {
          Room room(host_memory_.data());
          return HostRoom(room, shape);
        }()),
        workers_(sharing.workers),
        share_(sharing.device_share, sharing.follow),
        zero_copies_(!shape.all_resident &&
                     (sharing.workers == nullptr || sharing.follow || sharing.device_share > 0)),
        stream_(static_cast<cudaStream_t>(device.compute_stream().native_handle())) {
    check(cudaMemsetAsync(device_memory_.data(), 0, device_memory_.bytes(), stream_), "clearing");
    check(cudaStreamSynchronize(stream_), "clearing");
    std::memset(host_memory_.data(), 0, host_memory_.bytes());
    if (workers_ != nullptr) {
      mailbox_.emplace(on_host_.mailbox, mailbox_shape(shape_));
      for (int layer = 0; layer < shape_.experts.layers; ++layer) *mailbox_->slot(layer).tokens = 1;
    }
    const auto frequencies = inverse_frequencies(spec_.rope, spec_.head_dim);
    check(cudaMemcpy(on_device_.inverse_frequencies, frequencies.data(), frequencies.size() * sizeof(float),
                     cudaMemcpyHostToDevice),
          "copying");
    update_places();
    capture();
    check(cudaEventCreateWithFlags(&ended_, cudaEventBlockingSync | cudaEventDisableTiming), "an event");
  }

  ~CudaDecodeGraph() override {
    try {
      rest();
    } catch (const DeviceError&) {  // the workers' owner reports it
    }
    cudaGraphExecDestroy(executable_);
    cudaEventDestroy(ended_);
  }

  int64_t step(int64_t token, int64_t position) override {
    update_places();
    kv_.reserve(kSequence, position);
    kernels::StepInput& input = *on_host_.input;
    input.step = ++step_;
    input.zero_copy_share = share_.device_share();
    input.tokens[0] = static_cast<int>(token);
    input.positions[0] = static_cast<int>(position);
    write_tables(position);
    if (workers_ != nullptr && !working_) {
      workers_->start({*mailbox_, &places_, &input.zero_copy_share}, step_);
      working_ = true;
    }
    check(cudaGraphLaunch(executable_, stream_), "launching");
    await_step();
    if (on_host_.output->error == kernels::kNotFinite) {
      throw DeviceError("the logits are not finite at position " + std::to_string(position) +
                        "; the weights are damaged, or the model needs decode: eager");
    }
    if (on_host_.output->error != 0) throw_late(static_cast<int>(on_host_.output->error) - 1);
    share_.step_ended(static_cast<int>(on_host_.output->late), shape_.experts.layers);
    count();
    if (executor_ != nullptr && !shape_.all_resident) executor_->learn(chosen());
    return on_host_.output->ids[0];
  }

  void rest() override {
    if (!working_) return;
    working_ = false;
    workers_->stop();
  }

  at::Tensor logits() const override {
    return view_of(on_device_.logits, {1, spec_.vocab}, device_, DType::fp32).cpu();
  }
  ExpertCounters counters() const override {
    ExpertCounters counters = counters_;
    if (workers_ != nullptr) counters.cpu_busy_s = workers_->counters().busy_s;
    return counters;
  }

 private:
  // [layers, k]
  std::span<const int> chosen() const {
    return {on_host_.chosen, static_cast<size_t>(shape_.experts.layers * spec_.experts_per_token)};
  }

  // Beside polling workers the waiting thread sleeps: with every core busy the system now and then puts off a
  // worker, for whom all the others wait.
  void await_step() {
    if (!working_) return check(cudaStreamSynchronize(stream_), "running");
    check(cudaEventRecord(ended_, stream_), "recording");
    check(cudaEventSynchronize(ended_), "running");
  }

  [[noreturn]] void throw_late(int layer) {
    std::string why = "a worker has died or is starved of its core";
    try {
      rest();
    } catch (const DeviceError& error) {
      why = error.what();
    }
    throw DeviceError("decoding stopped at layer " + std::to_string(layer) +
                      ": the CPU's share of its experts did not come within " +
                      std::to_string(kernels::kWaitLimitMs) + " ms; " + why);
  }

  // The residency, when it has changed.
  void update_places() {
    if (executor_ == nullptr || (places_.version != 0 && places_.version == executor_->places_version()))
      return;
    places_ = executor_->slice_places();
    const auto upload = [&](const std::vector<const std::byte*>& from, const std::byte** to) {
      check(cudaMemcpy(to, from.data(), from.size() * sizeof(from[0]), cudaMemcpyHostToDevice), "copying");
    };
    upload(places_.device, on_device_.device_table);
    if (!shape_.all_resident) upload(places_.host, on_device_.host_table);
  }

  void write_tables(int64_t position) {
    int at = 0;
    for (const bool chunked : {false, true}) {
      if (tables_.blocks[chunked] == 0) continue;
      const auto& blocks = kv_.table(chunked).blocks(kSequence);
      std::copy(blocks.begin(), blocks.end(), on_host_.tables + at);
      at += tables_.blocks[chunked];
    }
    if (!schedule_) return;
    std::vector<int64_t> experts(spec_.experts_per_token);
    for (int layer = 0; layer < shape_.experts.layers; ++layer) {
      schedule_(layer, position, experts.data());
      std::copy(experts.begin(), experts.end(),
                on_host_.tables + tables_.forced_at + layer * spec_.experts_per_token);
    }
  }

  void count() {
    const int groups = groups_per_slice();
    for (int layer = 0; layer < shape_.experts.layers; ++layer) {
      uint64_t missed_here = 0;
      for (int rank = 0; rank < spec_.experts_per_token; ++rank) {
        const int expert = on_host_.chosen[layer * spec_.experts_per_token + rank];
        const size_t first = shape_.experts.index({layer, expert, 0});
        const auto begin = places_.device.begin() + static_cast<int64_t>(first);
        const auto missed = static_cast<uint64_t>(std::count(begin, begin + shape_.experts.slices, nullptr));
        counters_.slices_used += shape_.experts.slices;
        counters_.slices_resident += shape_.experts.slices - missed;
        counters_.slices_missed += missed;
        missed_here += missed;
      }
      const auto zero_copied = static_cast<uint64_t>(
          kernels::zero_copy_groups(static_cast<int>(missed_here) * groups, on_host_.input->zero_copy_share));
      const uint64_t group_bytes = shape_.experts.slice_bytes / groups;
      counters_.demand_bytes += zero_copied * group_bytes;
      counters_.cpu_bytes += (missed_here * groups - zero_copied) * group_bytes;
      if (missed_here > 0) count_times(on_host_.times[layer], zero_copied * group_bytes);
    }
  }

  // read: bytes of the layer that the device read from host memory.
  void count_times(const kernels::LayerTimes& at, uint64_t read) {
    const auto seconds = [](uint64_t from, uint64_t to) {
      return to > from ? static_cast<double>(to - from) * 1e-9 : 0;
    };
    uint64_t misses = at.cpu;
    if (read > 0) {
      counters_.stall_s += seconds(at.device_hidden, at.host_hidden);
      counters_.demand_busy_bytes += read;
      counters_.demand_busy_s +=
          seconds(at.routed, at.host_hidden) + seconds(at.host_down_begun, at.host_down);
      misses = std::max<uint64_t>(misses, at.host_down);
    }
    counters_.stall_s += seconds(at.device_down, misses);
  }

  int groups_per_slice() const {
    return static_cast<int>(shape_.slice_width / group_of(format_of(shape_.encoding)));
  }

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

  void capture() {
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "beginning the capture");
    try {
      enqueue();
    } catch (...) {
      cudaStreamEndCapture(stream_, &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      throw;
    }
    check(cudaStreamEndCapture(stream_, &graph), "ending the capture");
    const cudaError_t made = cudaGraphInstantiate(&executable_, graph, 0);
    cudaGraphDestroy(graph);
    check(made, "instantiating");
    check(cudaGraphUpload(executable_, stream_), "uploading");
  }

  void enqueue() {
    kernels::DecodeBegin begin;
    begin.input = on_host_.input;
    begin.state = on_device_.state;
    begin.hidden = spec_.hidden;
    begin.embedding = data(spec_.tied_head ? WeightRole::head : WeightRole::embedding);
    begin.residual = on_device_.residual;
    begin.tables_from = on_host_.tables;
    begin.tables_to = on_device_.tables;
    begin.table_entries = tables_.entries;
    begin.best = on_device_.best;
    begin.late = on_device_.late;
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
    end.late = on_device_.late;
    end.error = on_device_.error;
    end.state = on_device_.state;
    end.out = on_host_.output;
    end.ready = on_device_.ready;
    end.layers = shape_.experts.layers;
    end.chosen_from = on_device_.chosen;
    end.chosen_to = on_host_.chosen;
    end.chosen = shape_.experts.layers * spec_.experts_per_token;
    end.times_from = on_device_.times;
    end.times_to = on_host_.times;
    kernels::decode_end(end, stream_);
  }

  void attention(int layer) {
    const LayerSpec& kind = spec_.layers[layer];
    const int64_t q = spec_.heads * spec_.head_dim;
    auto qkv =
        linear(WeightRole::qkv, layer, q + 2 * spec_.kv_heads * spec_.head_dim, spec_.hidden, on_device_.qkv);
    qkv.normed = normed(WeightRole::attention_norm, layer);
    qkv.after_small = qkv.idle_before = !shape_.all_resident;  // the layer before waits for what is missed
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
    a.context = shape_.context;
    a.workspace = on_device_.attention_workspace;
    a.out = on_device_.attended;
    kernels::decode_attention(a, stream_);
    auto o = linear(WeightRole::o, layer, spec_.hidden, q, on_device_.residual);
    o.x = on_device_.attended;
    o.add = true;
    o.after_small = true;
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
    if (schedule_) r.forced = on_device_.tables + tables_.forced_at + moe_layer * spec_.experts_per_token;
    r.input = normed(WeightRole::ffn_norm, layer);
    r.device_table = on_device_.device_table + first;
    r.groups_per_slice = groups_per_slice();
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
    r.zero_copy_share = &on_device_.state->zero_copy_share;
    r.computed = on_device_.computed;
    r.positions = on_device_.positions;
    if (workers_ != nullptr) {
      const MissSlot slot = mailbox_->slot(moe_layer);
      r.post = {slot.x, slot.experts, slot.weights, slot.posted};
    }
    return r;
  }

  kernels::DecodeGateUp routed_gate_up(int layer) const {
    kernels::DecodeGateUp g;
    g.format = format_of(shape_.encoding);
    g.hidden = spec_.hidden;
    g.width = shape_.slice_width;
    g.input = normed(WeightRole::ffn_norm, layer);
    g.list = on_device_.resident;
    g.input_weights = spec_.weight_on == WeightOn::input ? on_device_.router_weights : nullptr;
    g.experts = spec_.experts;
    g.out = on_device_.routed;
    if (zero_copies_) {
      g.host_list = on_device_.zero_copy;
      g.host_out = on_device_.from_host;
      g.host_blocks = kZeroCopyBlocks;
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
      d.host_blocks = kZeroCopyBlocks;
    }
    return d;
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
    first.ready = on_device_.ready + spec_.layers[layer].moe_layer;
    down.ready = first.ready;
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
    if (workers_ != nullptr) {
      const MissSlot slot = mailbox_->slot(spec_.layers[layer].moe_layer);
      combine.from_cpu = slot.result;
      combine.cpu_done = slot.done;
    }
    combine.late = on_device_.late;
    combine.step = &on_device_.state->step;
    combine.error = on_device_.error;
    combine.layer = layer;
    combine.residual = on_device_.residual;
    combine.times = times_of(layer);
    kernels::decode_combine(combine, stream_);
  }

  const DecodeGraphShape shape_;
  const ModelSpec& spec_;
  const LoadedWeights& weights_;
  KvCache& kv_;
  ExpertExecutor* executor_;
  const RoutingSchedule schedule_;
  Device& device_;
  const TableLayout tables_;
  Buffer device_memory_;
  Buffer host_memory_;
  const DeviceRoom on_device_;
  const HostRoom on_host_;
  MissWorkers* const workers_;
  std::optional<MissMailbox> mailbox_;
  ShareControl share_;
  bool working_ = false;
  const bool zero_copies_;  // the GPU reads (some) missed slices from host memory
  cudaStream_t stream_;
  cudaGraphExec_t executable_ = nullptr;
  cudaEvent_t ended_ = nullptr;  // a waiting thread sleeps
  SlicePlaces places_;
  unsigned step_ = 0;
  ExpertCounters counters_;
};

}  // namespace

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
  return {};
}

uint64_t decode_graph_device_bytes(const DecodeGraphShape& shape) {
  return counted<DeviceRoom>(shape);
}

uint64_t decode_graph_host_bytes(const DecodeGraphShape& shape) {
  return counted<HostRoom>(shape);
}

std::unique_ptr<DecodeGraph> make_decode_graph(const DecodeGraphShape& shape, const LoadedWeights& weights,
                                               KvCache& kv, ExpertExecutor* executor,
                                               const RoutingSchedule& schedule, const MissSharing& sharing,
                                               Device& device) {
  return std::make_unique<CudaDecodeGraph>(shape, weights, kv, executor, schedule, sharing, device);
}

}  // namespace lighter::models
