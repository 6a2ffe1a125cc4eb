#include "bench/session_workbench.h"

#include <c10/util/Exception.h>
#include <malloc.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <iterator>
#include <random>
#include <thread>

#include "bench/requests.h"
#include "bench/step_recorder.h"
#include "offload/calibrate.h"
#include "offload/replay.h"
#include "offload/trace.h"
#include "runtime/cli/calibration_file.h"
#include "runtime/cli/model_config.h"
#include "runtime/cli/model_text.h"
#include "runtime/cli/predicted_speed.h"
#include "runtime/cli/session.h"
#include "runtime/config/yaml_values.h"
#include "runtime/device/host_memory.h"
#include "runtime/error.h"

namespace lighter::bench {
namespace {

using Clock = std::chrono::steady_clock;

std::string format_name(const Config& config) {
  switch (config.model.experts) {
    case SliceEncoding::int8:
      return "int8";
    case SliceEncoding::int4:
      return "int4";
    default:
      return std::string(dtype_name(config.model.dtype));
  }
}

std::string routing_name(const Config& config, const Inputs& inputs) {
  if (!inputs.trace.empty()) return "trace " + inputs.trace.filename().string();
  switch (config.offload.routing.schedule) {
    case RoutingConfig::Schedule::router:
      return "router";
    case RoutingConfig::Schedule::uniform:
      return "uniform";
    case RoutingConfig::Schedule::zipf: {
      char text[32];
      std::snprintf(text, sizeof text, "zipf:%g", config.offload.routing.zipf_s);
      return text;
    }
  }
  return "?";
}

MissWay miss_way(const cli::PreparedModel& model, const Config& config) {
  if (model.miss == OffloadConfig::Miss::split || cli::cpu_shares_batches(model, config))
    return MissWay::both;
  return model.miss == OffloadConfig::Miss::cpu ? MissWay::cpu : MissWay::link;
}

constexpr int64_t kApart = 7919;  // tokens of a trace between the places where a batch's sequences begin

// A recorded trace over the layers and positions of a model. Both are repeated where the model has more of
// them, all layers but the first, of which no layer before it had an expectation.
models::ScheduledRouting trace_schedule(const std::filesystem::path& file, const models::ModelSpec& spec) {
  const auto trace = std::make_shared<const offload::Trace>(offload::Trace::read(file));
  const offload::TraceHeader& header = trace->header();
  if (header.experts != spec.experts || header.experts_per_token != spec.experts_per_token) {
    throw ConfigError(file.string() + ": was recorded with " + std::to_string(header.experts_per_token) +
                      " of " + std::to_string(header.experts) + " experts a token, but the model takes " +
                      std::to_string(spec.experts_per_token) + " of " + std::to_string(spec.experts));
  }
  const int layers = static_cast<int>(header.layers.size()), k = header.experts_per_token;
  const auto recorded_layer = [layers](int layer) {
    return layer < layers ? layer : layers == 1 ? 0 : 1 + (layer - 1) % (layers - 1);
  };
  const auto token_at = [trace](int64_t position) {
    const int64_t sequence = position / models::kSequenceStride;
    return static_cast<size_t>(position % models::kSequenceStride + sequence * kApart) % trace->tokens();
  };
  models::ScheduledRouting routing;
  routing.chosen = [=](int moe_layer, int64_t position, int64_t* experts) {
    std::ranges::copy(trace->experts(token_at(position), recorded_layer(moe_layer)), experts);
  };
  if (header.depths.empty()) return routing;
  routing.expected = [=](int moe_layer, int64_t position, int64_t* experts) {
    const int layer = recorded_layer(moe_layer);
    std::fill_n(experts, k, -1);
    if (layer == 0) return;
    const auto& layers_at = trace->header().layers;  // the guess was made at the layer with experts before it
    const int depth = layers_at[layer] - layers_at[layer - 1];
    const auto logits = trace->guess_logits(token_at(position), layer, depth);
    std::ranges::copy(offload::top_experts(logits, k), experts);
  };
  return routing;
}

PointFacts facts_of(const Config& config, const cli::PreparedModel& model, const offload::SpeedShape& shape,
                    const std::string& device, const Inputs& inputs) {
  PointFacts facts;
  facts.architecture = model.spec.architecture;
  facts.device = device;
  facts.dtype = dtype_name(config.model.dtype);
  facts.has_experts = model.spec.moe_layers() > 0;
  if (facts.has_experts) {
    facts.experts = format_name(config);
    facts.routing = routing_name(config, inputs);
    facts.resident_share = model.plan.all_resident ? 1 : model.plan.resident_share;
  }
  facts.decode = model.why_eager.empty() ? "graph" : "eager: " + model.why_eager;
  facts.prompts = inputs.prompt_file.empty() ? "random ids, seed " + std::to_string(inputs.prompt_seed)
                                             : inputs.prompt_file.filename().string();
  facts.synthetic = config.model.is_synthetic();
  facts.layers = static_cast<int>(model.spec.layers.size());
  facts.threads = model.threads;
  facts.context = config.memory.context;
  facts.miss_way = miss_way(model, config);
  facts.step_bytes = offload::step_bytes(shape);
  facts.gpu_budget_bytes = config.memory.gpu_budget_bytes;
  facts.host_budget_bytes = config.memory.host_budget_bytes;
  for (const offload::PlanLine& line : model.plan.lines) {
    facts.memory.push_back({line.what, line.device_bytes, line.host_bytes});
  }
  return facts;
}

uint64_t resident_set_bytes() {
  malloc_trim(0);  // What the allocator keeps for later is no leak.
  uint64_t total = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return resident * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

// Of the resident set, since the last forget_process_peak().
uint64_t process_peak_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) return std::stoull(line.substr(6)) * 1024;
  }
  return 0;
}

void forget_process_peak() {
  std::ofstream("/proc/self/clear_refs") << "5";
}

// libtorch's errors carry a backtrace, and running out of the workspace is a matter of budgets.
template <typename Work>
auto translated(Work work) {
  try {
    return work();
  } catch (const c10::OutOfMemoryError& error) {
    throw CapacityError(
        std::string(
            "the device's workspace is used up; lower memory.prefill_chunk or memory.context (libtorch: ") +
        error.what_without_backtrace() + ")");
  } catch (const c10::Error& error) {
    throw DeviceError(std::string("libtorch: ") + error.what_without_backtrace());
  }
}

}  // namespace

class SessionWorkbench::Loaded : public LoadedPoint {
 public:
  Loaded(const Point& point, SessionWorkbench& bench)
      : config_path_(point.config),
        overrides_(point.overrides),
        inputs_(bench.sweep_.inputs),
        config_(cli::load_model_config(point.config, point.overrides)),
        model_(cli::prepare(config_)),
        shape_(cli::speed_shape(model_, config_)),
        calibration_(cli::usable_calibration(config_, model_.threads).calibration) {
    if (!inputs_.trace.empty() && !config_.model.is_synthetic() && model_.spec.moe_layers() > 0) {
      throw ConfigError(
          "a recorded trace replaces the router only of synthetic weights; remove 'trace', or use "
          "model.synthetic");
    }
    if (!inputs_.prompt_file.empty()) {
      text_ = cli::load_text(config_.model);
      if (!text_.tokenizer) {
        throw ConfigError("the prompts come from " + inputs_.prompt_file.string() +
                          ", but this model has no tokenizer; remove 'prompt.file' for random ids");
      }
      prompt_ids_ = text_.tokenizer->encode(read_text(inputs_.prompt_file), true);
    }
    models::ScheduledRouting schedule;
    if (model_.spec.moe_layers() > 0) {
      if (inputs_.trace.empty()) {
        schedule.chosen = cli::make_schedule(config_.offload.routing, model_.spec);
      } else {
        schedule = trace_schedule(inputs_.trace, model_.spec);
      }
    }
    for (models::RoutingSchedule* part : {&schedule.chosen, &schedule.expected}) {
      if (!*part) continue;
      // Each request goes on where the one before has ended, so that no cache has seen its routing before.
      *part = [this, of = std::move(*part)](int layer, int64_t position, int64_t* experts) {
        of(layer, first_position_ + position, experts);
      };
    }
    auto kept = bench.experts_.store_for(point, config_, model_);
    store_kept_ = kept && kept->filled();
    session_ = std::make_unique<cli::Session>(config_, model_, bench.progress_, std::move(schedule),
                                              std::move(kept));
    facts_ = facts_of(config_, model_, shape_, session_->device().name(), inputs_);
    requests_ = std::make_unique<Requests>(
        session_->decoder(), model_.prefill_chunk, [this] { return session_->counters(); }, bench.nvml_.get(),
        bench.interrupted_);
  }

  bool is(const Point& point) const { return config_path_ == point.config && overrides_ == point.overrides; }

  bool store_kept() const { return store_kept_; }

  PointFacts facts(const Workload& workload) const override {
    PointFacts facts = facts_;
    const bool graph = workload.batch == 1 && model_.why_eager.empty();
    if (workload.batch > 1 && facts.decode == "graph") facts.decode = "eager: the graph is for one sequence";
    const double context =
        static_cast<double>(workload.prompt_tokens) + static_cast<double>(workload.generated_tokens) / 2;
    const auto mode =
        workload.batch == 1 ? cli::miss_mode(model_) : cli::miss_mode_of_batches(model_, config_);
    const auto predicted = offload::decode_speed(
        shape_, {facts_.resident_share, workload.batch, context, graph}, calibration_, mode);
    if (predicted) facts.predicted_tokens_per_s = predicted->tokens_per_s;
    return facts;
  }

  RequestSample run(const Workload& workload, int request) override {
    first_position_ = request * (workload.prompt_tokens + workload.generated_tokens);
    return translated([&] { return requests_->run(prompts(workload, request), workload.generated_tokens); });
  }

  MemoryPeaks memory() const override {
    MemoryPeaks peaks;
    const bool cuda = session_->device().is_cuda();
    peaks.device_bytes =
        cuda ? session_->device().device_budget().peak_bytes() : session_->device_peak_bytes();
    if (cuda) peaks.device_driver_bytes = session_->device_peak_bytes();
    peaks.host_bytes = session_->host_peak_bytes();
    peaks.process_bytes = process_peak_bytes();
    return peaks;
  }

  Timeline record_step() override {
    const bool reads_host_memory = model_.why_eager.empty() && !model_.plan.all_resident &&
                                   model_.miss != OffloadConfig::Miss::cpu &&
                                   model_.miss != OffloadConfig::Miss::fetch;
    return translated([&] {
      return record_timeline([&] { return requests_->one_more_step(); }, session_->device().is_cuda(),
                             reads_host_memory,
                             [this] {
                               session_->decoder().rest();
                               return session_->latest_cpu_spans();
                             });
    });
  }

 private:
  // No two sequences of a batch are the same, and each request has others, as long as the text lasts.
  std::vector<std::vector<int64_t>> prompts(const Workload& w, int request) const {
    const int64_t first = static_cast<int64_t>(request) * w.batch;
    std::vector<std::vector<int64_t>> all;
    if (inputs_.prompt_file.empty()) {
      const auto vocab = static_cast<uint64_t>(model_.spec.vocab);
      for (int64_t i = first; i < first + w.batch; ++i) {
        std::mt19937_64 engine(inputs_.prompt_seed + static_cast<uint64_t>(i));
        all.emplace_back();
        for (int64_t t = 0; t < w.prompt_tokens; ++t)
          all.back().push_back(static_cast<int64_t>(engine() % vocab));
      }
      return all;
    }
    const int64_t pieces = static_cast<int64_t>(prompt_ids_.size()) / w.prompt_tokens;
    if (pieces < w.batch) {
      throw ConfigError(inputs_.prompt_file.string() + " has " + std::to_string(prompt_ids_.size()) +
                        " tokens, but " + std::to_string(w.prompt_tokens * w.batch) +
                        " are asked for; take a longer text");
    }
    for (int64_t i = first; i < first + w.batch; ++i) {
      const auto begin = prompt_ids_.begin() + i % pieces * w.prompt_tokens;
      all.emplace_back(begin, begin + w.prompt_tokens);
    }
    return all;
  }

  const std::filesystem::path config_path_;
  const std::vector<std::string> overrides_;
  const Inputs inputs_;
  const Config config_;
  const cli::PreparedModel model_;
  const offload::SpeedShape shape_;
  const offload::Calibration calibration_;
  cli::ModelText text_;
  std::vector<int64_t> prompt_ids_;  // of the prompt file
  PointFacts facts_;
  int64_t first_position_ = 0;  // of the request, in the schedule
  bool store_kept_ = false;
  std::unique_ptr<cli::Session> session_;
  std::unique_ptr<Requests> requests_;
};

SessionWorkbench::SessionWorkbench(const Sweep& sweep, const std::atomic<bool>& interrupted,
                                   Progress progress)
    : sweep_(sweep), interrupted_(interrupted), progress_(std::move(progress)), experts_(sweep) {
  const Point& first = sweep.points.front();
  const Config config = load_config(first.config, first.overrides);
  if (config.device.kind != DeviceConfig::Kind::cuda) return;
  cuda_index_ = config.device.index;
  in_use_bytes();  // throws where there is no such GPU
  nvml_ = Nvml::open(cuda_index_);
}

SessionWorkbench::~SessionWorkbench() = default;

Workbench::Load SessionWorkbench::load(const Point& point) {
  if (loaded_ != nullptr && loaded_->is(point)) {
    return {loaded_.get(), load_s_, true, loaded_->store_kept(), std::nullopt};
  }
  unload();
  const auto in_use = in_use_bytes();
  forget_process_peak();
  const auto begin = Clock::now();
  try {
    loaded_ = translated([&] { return std::make_unique<Loaded>(point, *this); });
  } catch (...) {
    experts_.drop_unfilled();
    throw;
  }
  load_s_ = std::chrono::duration<double>(Clock::now() - begin).count();
  return {loaded_.get(), load_s_, false, loaded_->store_kept(), in_use};
}

void SessionWorkbench::unload() {
  loaded_.reset();
}

// A device of our own, with budgets of nothing, can ask the driver too.
std::optional<uint64_t> SessionWorkbench::in_use_bytes() {
  if (cuda_index_ < 0) return resident_set_bytes() - experts_.bytes();
  return make_cuda_device(cuda_index_, 0, 0)->driver_used_bytes();
}

MachineFacts SessionWorkbench::machine() {
  MachineFacts facts;
  facts.device = cuda_index_ < 0 ? "cpu" : "cuda:" + std::to_string(cuda_index_);
  if (nvml_ != nullptr) {
    facts.gpu = nvml_->name();
    facts.driver = nvml_->driver();
  }
  facts.cpu = offload::cpu_name();
  facts.cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  facts.host_memory_bytes = machine_memory_bytes();
  return facts;
}

Rates SessionWorkbench::measure_rates(const Rates& given) {
  if (given.device_read && given.link && given.cpu_read && given.both) return given;
  const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  const bool cuda = cuda_index_ >= 0;
  constexpr uint64_t kDevice = offload::kCalibrationDeviceBytes;
  const uint64_t host = offload::ceilings_host_bytes(cuda);
  const uint64_t to_choose_from = std::max(host, machine_memory_bytes() / 4);
  const auto device =
      cuda ? make_cuda_device(cuda_index_, kDevice, to_choose_from) : make_cpu_device(kDevice, host);
  return offload::measure_ceilings(*device, std::max(1, cuda ? cores - 1 : cores), given);
}

}  // namespace lighter::bench
