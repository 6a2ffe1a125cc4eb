#include "runtime/cli/session.h"

#include <tbb/global_control.h>

#include <algorithm>

#include "models/checkpoint_source.h"
#include "models/quantizing_source.h"
#include "models/synthetic_source.h"
#include "offload/cpu_share.h"
#include "offload/expert_pager.h"
#include "offload/miss_fetcher.h"
#include "runtime/error.h"
#include "runtime/moe/resident_experts.h"

namespace lighter::cli {
namespace {

// Where neither the CPU nor the link has been measured: what an H100 on PCIe 5 and 16 cores settled at.
constexpr double kFirstDeviceShare = 0.25;

int cpu_experts_threads(const PreparedModel& model) {
  return std::min(model.threads, offload::CpuExperts::kMostThreads);
}

// How the CPU takes part in steps of several tokens.
std::optional<offload::BatchShareOptions> batch_share(const PreparedModel& model, const Config& config) {
  if (!cpu_shares_prompts(model, config)) return std::nullopt;
  offload::BatchShareOptions options;
  options.encoding = config.model.experts;
  options.hidden = model.spec.hidden;
  options.slice_width = model.slice_width;
  options.threads = cpu_experts_threads(model);
  if (config.offload.miss == OffloadConfig::Miss::cpu) {
    options.device_share = 0;
    options.follow = false;
  }
  return options;
}

// Loads the routed experts behind the executor that the plan asks for.
std::unique_ptr<ExpertExecutor> make_executor(Device& device, const PreparedModel& model,
                                              const Config& config, const models::TensorSource& source,
                                              const Progress& progress,
                                              std::shared_ptr<offload::ExpertStore> kept) {
  const models::ModelSpec& spec = model.spec;
  const SliceShape shape{spec.hidden, model.slice_width};
  auto format = config.model.experts == SliceEncoding::dense
                    ? make_dense_format(shape, config.model.dtype)
                    : make_quantized_format(shape, config.model.experts);
  const ExpertGrid grid{spec.moe_layers(), spec.experts,
                        static_cast<int>(spec.expert_ffn / model.slice_width), format->slice_bytes()};
  if (model.plan.all_resident) {
    auto resident = std::make_unique<ResidentExperts>(device, grid, std::move(format));
    resident->load(kept && kept->filled() ? static_cast<const SliceSource&>(*kept) : source, progress);
    return resident;
  }
  offload::PagerOptions options = model.plan.pager;
  options.near_pages = config.offload.near_pages && cpu_shares_prompts(model, config);
  const int depth = options.prefetch ? config.offload.prefetch.depth : 0;
  auto pager = std::make_unique<offload::ExpertPager>(device, grid, std::move(format), options, depth,
                                                      batch_share(model, config), std::move(kept));
  pager->load(source, progress);
  return pager;
}

// Those that see to what a decode graph misses.
std::unique_ptr<MissWorkers> make_workers(Device& device, const PreparedModel& model,
                                          const models::DecodeGraphShape& shape) {
  if (shape.fetches) {
    return std::make_unique<offload::MissFetcher>(device, shape.experts, model.spec.experts_per_token);
  }
  offload::CpuExpertsOptions options;
  options.threads = cpu_experts_threads(model);
  return std::make_unique<offload::CpuShare>(shape.experts, shape.encoding, model.spec.hidden,
                                             shape.slice_width, model.spec.weight_on, options);
}

std::string joined(const std::vector<std::string>& problems) {
  std::string text = "the model does not fit:";
  for (const std::string& problem : problems) text += "\n  " + problem;
  return text;
}

}  // namespace

std::unique_ptr<Device> make_device(const Config& config) {
  const MemoryConfig& memory = config.memory;
  if (config.device.kind == DeviceConfig::Kind::cpu) {
    return make_cpu_device(memory.gpu_budget_bytes, memory.host_budget_bytes);
  }
  return make_cuda_device(config.device.index, memory.gpu_budget_bytes, memory.host_budget_bytes);
}

models::RoutingSchedule make_schedule(const RoutingConfig& routing, const models::ModelSpec& spec) {
  switch (routing.schedule) {
    case RoutingConfig::Schedule::router:
      return {};
    case RoutingConfig::Schedule::uniform:
      return models::uniform_schedule(spec.experts, spec.experts_per_token, routing.seed);
    case RoutingConfig::Schedule::zipf:
      return models::zipf_schedule(spec.experts, spec.experts_per_token, spec.moe_layers(), routing.zipf_s,
                                   routing.seed);
  }
  return {};
}

struct Session::Threads {
  // One more, because the caller's counts too.
  explicit Threads(int count) : limit(tbb::global_control::max_allowed_parallelism, count + 1) {}
  tbb::global_control limit;
};

Session::Session(const Config& config, const PreparedModel& model, const Progress& progress,
                 models::ScheduledRouting schedule, std::shared_ptr<offload::ExpertStore> kept,
                 std::unique_ptr<MissWorkers> workers)
    : spec_(model.spec), workers_(std::move(workers)) {
  if (!model.plan.fits()) throw CapacityError(joined(model.plan.problems));
  // What is cheap to find wrong comes first.
  if (!config.model.is_synthetic()) {
    source_ = std::make_unique<models::CheckpointSource>(config.model.path, spec_, config.model.dtype,
                                                         model.slice_width, model.stored);
  } else {
    source_ = std::make_unique<models::SyntheticSource>(spec_, config.model.dtype, config.model.experts,
                                                        model.slice_width, config.model.seed);
  }
  if (!config.model.is_synthetic() && !model.stored && config.model.experts != SliceEncoding::dense) {
    source_ =
        std::make_unique<models::QuantizingSource>(std::move(source_), spec_, config.model.dtype,
                                                   config.model.experts, model.slice_width, model.threads);
  }
  threads_ = std::make_unique<Threads>(model.threads);
  device_ = make_device(config);
  device_->device_budget().take(model.reserve_bytes, "the reserve");
  torch_ = std::make_unique<TorchScope>(*device_, model.workspace_bytes, model.threads);
  weights_ = std::make_unique<models::LoadedWeights>(*device_, spec_, *source_, model.formats, progress);
  kv_ = std::make_unique<KvCache>(*device_, model.kv);
  if (spec_.moe_layers() > 0) {
    executor_ = make_executor(*device_, model, config, *source_, progress, std::move(kept));
    executor_->prepare({model.prefill_chunk}, models::shared_experts(spec_, *weights_));
    if (!schedule.chosen) schedule.chosen = make_schedule(config.offload.routing, spec_);
  }
  decoder_ = std::make_unique<models::Decoder>(spec_, *weights_, *kv_, executor_.get(), schedule.chosen,
                                               *device_, config.model.dtype);
  if (model.why_eager.empty()) {
    const models::DecodeGraphShape shape = decode_graph_shape(model, config);
    models::MissSharing sharing;
    if ((shape.fetches || shape.with_workers) && !shape.all_resident) {
      if (!workers_) workers_ = make_workers(*device_, model, shape);
      const bool split = model.miss == OffloadConfig::Miss::split;
      sharing = {workers_.get(), shape.fetches ? 1 : split ? kFirstDeviceShare : 0, split};
      sharing.guess =
          shape.with_workers && model.plan.pager.prefetch && (!schedule.chosen || schedule.expected);
      if (sharing.guess) sharing.expected = schedule.expected;
    }
    decoder_->decode_by(models::make_decode_graph(shape, *weights_, *kv_, executor_.get(), schedule.chosen,
                                                  sharing, *device_));
  }
}

// It has no part where it stands in for the device itself.
bool cpu_shares_prompts(const PreparedModel& model, const Config& config) {
  using Miss = OffloadConfig::Miss;
  const Miss miss = config.offload.miss;
  if (config.model.experts == SliceEncoding::dense) return false;
  return miss == Miss::cpu || miss == Miss::split ||
         (miss == Miss::automatic && config.device.kind != DeviceConfig::Kind::cpu && model.threads > 1);
}

bool cpu_shares_batches(const PreparedModel& model, const Config& config) {
  return model.kv.sequences > 1 && cpu_shares_prompts(model, config);
}

ExpertCounters Session::counters() const {
  ExpertCounters counters = executor_ ? executor_->counters() : ExpertCounters();
  if (decoder_->graph() != nullptr) counters = counters + decoder_->graph()->counters();
  return counters;
}

std::vector<MissSpan> Session::latest_cpu_spans() const {
  return workers_ ? workers_->latest_spans() : std::vector<MissSpan>();
}

Session::~Session() = default;

uint64_t Session::device_peak_bytes() const {
  const uint64_t entered = device_->device_budget().peak_bytes();
  if (!device_->is_cuda()) return entered - torch_->workspace_bytes() + torch_->peak_bytes();
  return device_->driver_used_bytes();
}

}  // namespace lighter::cli
