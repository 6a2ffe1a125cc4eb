#include "models/decode_graph.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <thread>

#include "models/decode_kernels.h"
#include "models/decode_room.h"
#include "models/rope.h"
#include "runtime/error.h"
#include "runtime/kernels/decode.h"
#include "runtime/kernels/decode_attention.h"
#include "runtime/moe/share_control.h"
#include "runtime/step_number.h"
#include "runtime/torch/tensors.h"

namespace lighter::models {
namespace {

constexpr int kSequence = 0;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw DeviceError(std::string("the decode graph: ") + what + ": " + cudaGetErrorString(error));
}

struct DestroyGraph {
  void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
};
using Executable = std::unique_ptr<CUgraphExec_st, DestroyGraph>;

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
        device_memory_(device.allocate(counted_room<DeviceRoom>(shape), "the decode step")),
        host_memory_(device.allocate_host(counted_room<HostRoom>(shape), "the decode step's input")),
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
        guesses_(sharing.guess && spec_.experts <= kernels::kMostGuessedExperts),
        expected_(sharing.expected),
        zero_copies_(!shape.all_resident &&
                     (sharing.workers == nullptr || sharing.follow || sharing.device_share > 0)),
        // Copies that a fetcher has begun for a step end with it. And while a worker who has lost its core
        // keeps a layer from being done whose result is whole, the device posts the one after the next, and
        // guesses the one behind it: these must be other ones.
        goes_ahead_((shape.all_resident || (!shape.fetches && shape.experts.layers > 3)) &&
                    (executor == nullptr || executor->places_stay())),
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
    // Steps with few keys have kernels of their own.
    short_step_ = capture(std::min(shape_.context, kernels::kFewKeys));
    if (shape_.context > kernels::kFewKeys) long_step_ = capture(shape_.context);
    for (cudaEvent_t& event : ended_) {
      check(cudaEventCreateWithFlags(&event, cudaEventBlockingSync | cudaEventDisableTiming), "an event");
    }
  }

  ~CudaDecodeGraph() override {
    try {
      rest();
    } catch (const DeviceError&) {  // the workers' owner reports it
    }
    cudaStreamSynchronize(stream_);  // an error may have left a step under way, which writes to our memory
    for (const cudaEvent_t event : ended_) cudaEventDestroy(event);
  }

  int64_t step(int64_t token, int64_t position, bool goes_on) override {
    if (ahead_ && (token != ahead_->token || position != ahead_->position)) {
      await_ahead();
      throw_if_late(step_);
    }
    if (!ahead_) enqueue(token, position);
    ahead_.reset();
    const unsigned step = step_;
    if (goes_on && goes_ahead_ && position + 1 < shape_.context) {
      enqueue(kernels::kFoundToken, position + 1);
      ahead_ = {.token = kernels::kFoundToken, .position = position + 1};
    }
    await(step);
    const kernels::StepOutput& output = on_host_.output[slot_of(step)];
    if (output.error == kernels::kNotFinite) {
      throw DeviceError("the logits are not finite at position " + std::to_string(position) +
                        "; the weights are damaged, or the model needs decode: eager");
    }
    throw_if_late(step);
    await_workers(step);
    share_.step_ended(late_layers(step), shape_.experts.layers);
    count(step);
    if (executor_ != nullptr && !shape_.all_resident) executor_->learn(chosen(step));
    if (ahead_) ahead_->token = output.ids[0];
    return output.ids[0];
  }

  void rest() override {
    try {
      if (ahead_) await_ahead();
    } catch (...) {  // nothing may poll what is freed soon
      stop_workers();
      throw;
    }
    stop_workers();
  }

  at::Tensor logits() const override {
    return view_of(on_device_.logits, {1, spec_.vocab}, device_, DType::fp32).cpu();
  }
  ExpertCounters counters() const override {
    ExpertCounters counters = counters_;
    if (workers_ == nullptr) return counters;
    const MissWorkersCounters workers = workers_->counters();
    counters.cpu_busy_s = workers.busy_s;
    counters.cpu_layers = workers.layers;
    counters.cpu_layers_expected = workers.layers_expected;
    return counters;
  }

 private:
  // A step that is enqueued though nobody has asked for it yet.
  struct Ahead {
    int64_t token, position;
  };

  // [layers, k]
  std::span<const int> chosen(unsigned step) const {
    const auto count = static_cast<size_t>(shape_.experts.layers * spec_.experts_per_token);
    return {on_host_.chosen + slot_of(step) * count, count};
  }

  void enqueue(int64_t token, int64_t position) {
    update_places();
    kv_.reserve(kSequence, position);
    const unsigned step = step_ + 1;
    const int slot = slot_of(step);
    kernels::StepInput& input = on_host_.input[slot];
    input.step = step;
    input.zero_copy_share = device_shares_[slot] = share_.device_share();
    input.tokens[0] = static_cast<int>(token);
    input.positions[0] = static_cast<int>(position);
    write_tables(position, on_host_.tables + slot * tables_.entries);
    if (workers_ != nullptr && !working_) {
      MissWork work{*mailbox_, &places_, device_shares_, {}};
      if (shape_.fetches) work.arrivals = {on_device_.slots, on_device_.slot_arrived, on_host_.tags};
      workers_->start(work, step);
      working_ = true;
    }
    const Executable& executable = position < kernels::kFewKeys ? short_step_ : long_step_;
    check(cudaGraphLaunch(executable.get(), stream_), "launching");
    step_ = step;
    if (working_) check(cudaEventRecord(ended_[slot], stream_), "recording");
  }

  // Beside polling workers the waiting thread sleeps: with every core busy the system now and then puts off a
  // worker.
  void await(unsigned step) {
    if (working_) {
      check(cudaEventSynchronize(ended_[slot_of(step)]), "running");
      return;
    }
    constexpr int between_queries = 4096;
    const std::atomic_ref done(on_host_.output[slot_of(step)].step);
    for (int turn = 1; done.load(std::memory_order_acquire) != step; ++turn) {
      if (turn % between_queries != 0) continue;
      const cudaError_t state = cudaStreamQuery(stream_);
      if (state == cudaSuccess && done.load(std::memory_order_acquire) != step) {
        throw DeviceError("the decode graph: step " + std::to_string(step) + " has ended without a result");
      }
      if (state != cudaErrorNotReady) check(state, "running");
    }
  }

  // Its token is of no use.
  void await_ahead() {
    ahead_.reset();
    await(step_);
    if (on_host_.output[slot_of(step_)].error == 0) await_workers(step_);
    count(step_);
  }

  void stop_workers() {
    if (!working_) return;
    working_ = false;
    workers_->stop();
  }

  // The device waits for results, not for workers, who may still be at a step's last two layers, and must not
  // look into the next step's places and shares.
  void await_workers(unsigned step) {
    if (!working_) return;
    for (int layer = std::max(0, shape_.experts.layers - 2); layer < shape_.experts.layers; ++layer) {
      await_workers_until(layer, [&] { return step_reached(mailbox_->done(layer), step); });
    }
  }
  // Then a worker may still list a layer to which it has come too late.
  void await_idle_workers() {
    if (working_) await_workers_until(shape_.experts.layers - 1, [&] { return workers_->idle(); });
  }
  template <typename Ready>
  void await_workers_until(int layer, const Ready& ready) {
    const auto limit = std::chrono::steady_clock::now() + std::chrono::milliseconds(kernels::kWaitLimitMs);
    while (!ready()) {
      if (std::chrono::steady_clock::now() > limit) throw_late(layer);
      std::this_thread::yield();
    }
  }

  void throw_if_late(unsigned step) {
    const unsigned error = on_host_.output[slot_of(step)].error;
    if (error != 0 && error != kernels::kNotFinite) throw_late(static_cast<int>(error) - 1);
  }

  [[noreturn]] void throw_late(int layer) {
    std::string why = "a worker has died or is starved of its core";
    try {
      rest();
    } catch (const DeviceError& error) {
      why = error.what();
    }
    throw DeviceError("decoding stopped at layer " + std::to_string(layer) + ": " +
                      (shape_.fetches ? "its missed experts" : "the CPU's share of its experts") +
                      " did not come within " + std::to_string(kernels::kWaitLimitMs) + " ms; " + why);
  }

  // The residency, when it has changed.
  void update_places() {
    if (executor_ == nullptr || (places_.version != 0 && places_.version == executor_->places_version()))
      return;
    await_idle_workers();
    const bool first = places_.version == 0;
    places_ = executor_->slice_places();
    const auto upload = [&](const std::vector<const std::byte*>& from, const std::byte** to) {
      check(cudaMemcpy(to, from.data(), from.size() * sizeof(from[0]), cudaMemcpyHostToDevice), "copying");
    };
    upload(places_.device, on_device_.device_table);
    if (first && !shape_.all_resident) upload(places_.host, on_device_.host_table);
  }

  void write_tables(int64_t position, int* to) {
    int at = 0;
    for (const bool chunked : {false, true}) {
      if (tables_.blocks[chunked] == 0) continue;
      const auto& blocks = kv_.table(chunked).blocks(kSequence);
      std::copy(blocks.begin(), blocks.end(), to + at);
      at += tables_.blocks[chunked];
    }
    write_schedule(schedule_, position, to + tables_.forced_at);
    write_schedule(expected_, position, to + tables_.guessed_at);
  }

  // to: [layers, k]
  void write_schedule(const RoutingSchedule& schedule, int64_t position, int* to) const {
    if (!schedule) return;
    std::vector<int64_t> experts(spec_.experts_per_token);
    for (int layer = 0; layer < shape_.experts.layers; ++layer) {
      schedule(layer, position, experts.data());
      to = std::copy(experts.begin(), experts.end(), to);
    }
  }

  // Of layers, if not all experts are resident.
  const kernels::LayerTimes* times_of(unsigned step) const {
    return on_host_.times + slot_of(step) * shape_.experts.layers;
  }

  // In how many layers of the step the device had to wait for the CPU.
  int late_layers(unsigned step) const {
    if (workers_ == nullptr || shape_.all_resident) return 0;
    const auto late = [](const kernels::LayerTimes& at) {
      return at.cpu > std::max(at.device_down, at.host_down);
    };
    return static_cast<int>(std::count_if(times_of(step), times_of(step) + shape_.experts.layers, late));
  }

  void count(unsigned step) {
    const auto experts = chosen(step);
    const int groups = groups_per_slice(shape_);
    const kernels::LayerTimes* const times = times_of(step);
    for (int layer = 0; layer < shape_.experts.layers; ++layer) {
      uint64_t missed_here = 0;
      for (int rank = 0; rank < spec_.experts_per_token; ++rank) {
        const int expert = experts[static_cast<size_t>(layer * spec_.experts_per_token + rank)];
        const size_t first = shape_.experts.index({layer, expert, 0});
        const auto begin = places_.device.begin() + static_cast<int64_t>(first);
        const auto missed = static_cast<uint64_t>(std::count(begin, begin + shape_.experts.slices, nullptr));
        counters_.slices_used += shape_.experts.slices;
        counters_.slices_resident += shape_.experts.slices - missed;
        counters_.slices_missed += missed;
        missed_here += missed;
      }
      const auto zero_copied = static_cast<uint64_t>(
          kernels::zero_copy_groups(static_cast<int>(missed_here) * groups, device_shares_[slot_of(step)]));
      const uint64_t group_bytes = shape_.experts.slice_bytes / groups;
      counters_.demand_bytes += zero_copied * group_bytes;
      counters_.cpu_bytes += (missed_here * groups - zero_copied) * group_bytes;
      if (missed_here > 0) count_times(times[layer], zero_copied * group_bytes);
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
      counters_.demand_busy_s += seconds(at.routed, at.host_hidden);
      if (!shape_.fetches) counters_.demand_busy_s += seconds(at.host_down_begun, at.host_down);
      misses = std::max<uint64_t>(misses, at.host_down);
    }
    counters_.stall_s += seconds(at.device_down, misses);
  }

  // context: keys of a step at most.
  Executable capture(int64_t context) {
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "beginning the capture");
    try {
      enqueue_decode_kernels(
          {shape_, weights_, kv_, on_device_, on_host_, context, static_cast<bool>(schedule_), zero_copies_,
           mailbox_ ? &*mailbox_ : nullptr, guesses_, static_cast<bool>(expected_)},
          stream_);
    } catch (...) {
      cudaStreamEndCapture(stream_, &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      throw;
    }
    check(cudaStreamEndCapture(stream_, &graph), "ending the capture");
    cudaGraphExec_t made = nullptr;
    const cudaError_t result = cudaGraphInstantiate(&made, graph, 0);
    cudaGraphDestroy(graph);
    check(result, "instantiating");
    Executable executable(made);
    check(cudaGraphUpload(made, stream_), "uploading");
    return executable;
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
  std::atomic<unsigned> device_shares_[kStepsAtOnce] = {};  // of the steps in their slots
  const bool guesses_;
  const RoutingSchedule expected_;
  bool working_ = false;
  const bool zero_copies_;  // the GPU reads (some) missed slices from host memory
  const bool goes_ahead_;   // steps are enqueued before those before them have ended
  cudaStream_t stream_;
  Executable short_step_;        // of positions below kFewKeys
  Executable long_step_;         // of the others, if there are any
  cudaEvent_t ended_[kStepsAtOnce] = {};  // of the steps in their slots; a waiting thread sleeps
  SlicePlaces places_;
  unsigned step_ = 0;           // the latest that is enqueued
  std::optional<Ahead> ahead_;  // it, if nobody has asked for it
  ExpertCounters counters_;
};

}  // namespace

std::unique_ptr<DecodeGraph> make_decode_graph(const DecodeGraphShape& shape, const LoadedWeights& weights,
                                               KvCache& kv, ExpertExecutor* executor,
                                               const RoutingSchedule& schedule, const MissSharing& sharing,
                                               Device& device) {
  return std::make_unique<CudaDecodeGraph>(shape, weights, kv, executor, schedule, sharing, device);
}

}  // namespace lighter::models
