#include "bench/session_workbench.h"

#include <c10/util/Exception.h>
#include <malloc.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <iterator>
#include <random>
#include <thread>

#include "bench/rates.h"
#include "bench/requests.h"
#include "bench/step_recorder.h"
#include "offload/trace.h"
#include "runtime/cli/model_text.h"
#include "runtime/cli/session.h"
#include "runtime/config/yaml_values.h"
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

MissWay miss_way(const cli::PreparedModel& model) {
  if (model.miss == OffloadConfig::Miss::split) return MissWay::both;
  return model.miss == OffloadConfig::Miss::cpu ? MissWay::cpu : MissWay::link;
}

// A recorded trace over the layers and positions of a model: both are repeated where the model has more of
// them.
models::RoutingSchedule trace_schedule(const std::filesystem::path& file, const models::ModelSpec& spec) {
  const auto trace = std::make_shared<const offload::Trace>(offload::Trace::read(file));
  const offload::TraceHeader& header = trace->header();
  if (header.experts != spec.experts || header.experts_per_token != spec.experts_per_token) {
    throw ConfigError(file.string() + ": was recorded with " + std::to_string(header.experts_per_token) +
                      " of " + std::to_string(header.experts) + " experts a token, but the model takes " +
                      std::to_string(spec.experts_per_token) + " of " + std::to_string(spec.experts));
  }
  const int layers = static_cast<int>(header.layers.size());
  return [trace, layers](int moe_layer, int64_t position, int64_t* experts) {
    const auto token = static_cast<size_t>(position) % trace->tokens();
    std::ranges::copy(trace->experts(token, moe_layer % layers), experts);
  };
}

StepBytes step_bytes(const cli::PreparedModel& model, const Config& config) {
  StepBytes bytes;
  const std::string shared = models::weight_class_name(models::WeightClass::shared_expert);
  for (const auto weight_class :
       {models::WeightClass::attention, models::WeightClass::norms, models::WeightClass::router,
        models::WeightClass::shared_expert, models::WeightClass::dense_ffn, models::WeightClass::head}) {
    const std::string name = models::weight_class_name(weight_class);
    for (const offload::PlanLine& line : model.plan.lines) {
      if (line.what != name && line.what != name + " and embedding") continue;
      bytes.fixed += line.device_bytes;
      if (name == shared) bytes.shared += line.device_bytes;
    }
  }
  const models::ModelSpec& spec = model.spec;
  bytes.moe_layers = spec.moe_layers();
  if (bytes.moe_layers > 0) {
    bytes.experts = spec.experts;
    bytes.experts_per_token = spec.experts_per_token;
    bytes.expert = static_cast<uint64_t>(spec.expert_ffn / model.slice_width) * model.slice_bytes;
  }
  bytes.kv_per_token = spec.layers.size() * 2 * static_cast<uint64_t>(spec.kv_heads * spec.head_dim) *
                       dtype_size(config.model.dtype);
  return bytes;
}

PointFacts facts_of(const Config& config, const cli::PreparedModel& model, const std::string& device,
                    const Inputs& inputs) {
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
  facts.miss_way = miss_way(model);
  facts.step_bytes = step_bytes(model, config);
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

std::string cpu_name() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown";
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
  Loaded(const Point& point, const SessionWorkbench& bench)
      : config_path_(point.config),
        overrides_(point.overrides),
        inputs_(bench.sweep_.inputs),
        config_(load_config(point.config, point.overrides)),
        model_(cli::prepare(config_)) {
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
    models::RoutingSchedule schedule;
    if (!inputs_.trace.empty() && model_.spec.moe_layers() > 0)
      schedule = trace_schedule(inputs_.trace, model_.spec);
    session_ = std::make_unique<cli::Session>(config_, model_, bench.progress_, std::move(schedule));
    facts_ = facts_of(config_, model_, session_->device().name(), inputs_);
    requests_ = std::make_unique<Requests>(
        session_->decoder(), model_.prefill_chunk, [this] { return session_->counters(); }, bench.nvml_.get(),
        bench.interrupted_);
  }

  bool is(const Point& point) const { return config_path_ == point.config && overrides_ == point.overrides; }

  const PointFacts& facts() const override { return facts_; }

  RequestSample run(const Workload& workload) override {
    return translated([&] { return requests_->run(prompts(workload), workload.generated_tokens); });
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

  std::optional<Timeline> record_step() override {
    return translated(
        [&] { return record_timeline([&] { requests_->one_more_step(); }, session_->device().is_cuda()); });
  }

 private:
  // Sequence i takes the tokens from i · prompt_tokens on, so that no two are the same.
  std::vector<std::vector<int64_t>> prompts(const Workload& w) const {
    if (w.batch > model_.kv.sequences) {
      throw ConfigError("a batch of " + std::to_string(w.batch) + ", but the model is loaded for " +
                        std::to_string(model_.kv.sequences) + " sequences at once");
    }
    if (w.prompt_tokens + w.generated_tokens > config_.memory.context) {
      throw ConfigError(std::to_string(w.prompt_tokens) + " + " + std::to_string(w.generated_tokens) +
                        " tokens, but memory.context is " + std::to_string(config_.memory.context) +
                        "; raise it");
    }
    const int64_t wanted = w.prompt_tokens * w.batch;
    std::vector<int64_t> ids = prompt_ids_;
    if (inputs_.prompt_file.empty()) {
      std::mt19937_64 engine(inputs_.prompt_seed);
      const auto vocab = static_cast<uint64_t>(model_.spec.vocab);
      for (int64_t i = 0; i < wanted; ++i) ids.push_back(static_cast<int64_t>(engine() % vocab));
    } else if (static_cast<int64_t>(ids.size()) < wanted) {
      throw ConfigError(inputs_.prompt_file.string() + " has " + std::to_string(ids.size()) +
                        " tokens, but " + std::to_string(wanted) + " are asked for; take a longer text");
    }
    std::vector<std::vector<int64_t>> all;
    for (auto at = ids.begin(); static_cast<int>(all.size()) < w.batch; at += w.prompt_tokens) {
      all.emplace_back(at, at + w.prompt_tokens);
    }
    return all;
  }

  const std::filesystem::path config_path_;
  const std::vector<std::string> overrides_;
  const Inputs inputs_;
  const Config config_;
  const cli::PreparedModel model_;
  cli::ModelText text_;
  std::vector<int64_t> prompt_ids_;  // of the prompt file
  PointFacts facts_;
  std::unique_ptr<cli::Session> session_;
  std::unique_ptr<Requests> requests_;
};

SessionWorkbench::SessionWorkbench(const Sweep& sweep, const std::atomic<bool>& interrupted,
                                   Progress progress)
    : sweep_(sweep), interrupted_(interrupted), progress_(std::move(progress)) {
  const Point& first = sweep.points.front();
  const Config config = load_config(first.config, first.overrides);
  if (config.device.kind != DeviceConfig::Kind::cuda) return;
  cuda_index_ = config.device.index;
  nvml_ = Nvml::open(cuda_index_);
}

SessionWorkbench::~SessionWorkbench() = default;

Workbench::Load SessionWorkbench::load(const Point& point) {
  if (loaded_ != nullptr && loaded_->is(point)) return {loaded_.get(), load_s_, true, std::nullopt};
  unload();
  const auto in_use = in_use_bytes();
  forget_process_peak();
  const auto begin = Clock::now();
  loaded_ = translated([&] { return std::make_unique<Loaded>(point, *this); });
  load_s_ = std::chrono::duration<double>(Clock::now() - begin).count();
  return {loaded_.get(), load_s_, false, in_use};
}

void SessionWorkbench::unload() {
  loaded_.reset();
}

// A device of our own, with budgets of nothing, can ask the driver too.
std::optional<uint64_t> SessionWorkbench::in_use_bytes() {
  if (cuda_index_ < 0) return resident_set_bytes();
  return make_cuda_device(cuda_index_, 0, 0)->driver_used_bytes();
}

MachineFacts SessionWorkbench::machine() {
  MachineFacts facts;
  facts.device = cuda_index_ < 0 ? "cpu" : "cuda:" + std::to_string(cuda_index_);
  if (nvml_ != nullptr) {
    facts.gpu = nvml_->name();
    facts.driver = nvml_->driver();
  }
  facts.cpu = cpu_name();
  facts.cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  facts.host_memory_bytes =
      static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  return facts;
}

Rates SessionWorkbench::measure_rates(const Rates& given) {
  if (given.device_read && given.link && given.cpu_read && given.both) return given;
  constexpr uint64_t kDevice = uint64_t{5} << 29, kHost = uint64_t{9} << 27;
  const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  const bool cuda = cuda_index_ >= 0;
  const auto device = cuda ? make_cuda_device(cuda_index_, kDevice, kHost) : make_cpu_device(kDevice, kHost);
  return translated(
      [&] { return bench::measure_rates(*device, std::max(1, cuda ? cores - 1 : cores), given); });
}

}  // namespace lighter::bench
