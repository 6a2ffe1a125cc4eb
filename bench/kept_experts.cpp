#include "bench/kept_experts.h"

#include <algorithm>

#include "runtime/cli/model_config.h"
#include "runtime/error.h"

namespace lighter::bench {
namespace {

std::string weights_of(const Config& config) {
  const ModelConfig& model = config.model;
  const nlohmann::json all = {model.path.string(),
                              model.synthetic,
                              dtype_name(model.dtype),
                              static_cast<int>(model.experts),
                              model.layers.value_or(0),
                              model.seed,
                              config.offload.slice_width,
                              config.offload.near_pages,
                              config.device.kind == DeviceConfig::Kind::cuda ? config.device.index : -1};
  return all.dump();
}

// What the plan enters for the experts' home.
uint64_t homes_bytes(const offload::Plan& plan) {
  uint64_t bytes = 0;
  for (const offload::PlanLine& line : plan.lines) {
    if (line.what == offload::kExpertStoreLine) bytes += line.host_bytes;
  }
  return bytes;
}

}  // namespace

KeptExperts::KeptExperts(const Sweep& sweep) : sweep_(sweep) {
  for (const Point& point : sweep.points) {
    try {
      weights_.push_back(weights_of(cli::load_model_config(point.config, point.overrides)));
    } catch (const Error&) {  // said when its turn comes; nobody shares what it cannot load
      weights_.emplace_back();
    }
  }
}

std::shared_ptr<offload::ExpertStore> KeptExperts::store_for(const Point& point, const Config& config,
                                                             const cli::PreparedModel& model) {
  const auto found = std::ranges::find(sweep_.points, point.id, &Point::id);
  const auto place = static_cast<size_t>(found - sweep_.points.begin());
  furthest_ = std::max(furthest_, place);
  const std::string weights = weights_of(config);
  const uint64_t beside = model.plan.host_bytes - homes_bytes(model.plan);
  if (store_ && kept_weights_ == weights) {
    if (store_->bytes() + beside <= config.memory.host_budget_bytes) return store_;
    drop();
  }
  if (store_ && (!needed_after(furthest_, kept_weights_, point) ||
                 store_->bytes() + model.plan.host_bytes > budget_bytes_)) {
    drop();
  }
  const ExpertGrid grid = cli::decode_graph_shape(model, config).experts;
  const bool fits = model.plan.fits() && grid.total_bytes() + beside <= config.memory.host_budget_bytes;
  if (model.plan.all_resident || !fits || !needed_after(furthest_, weights, point)) return nullptr;
  drop();
  const uint64_t room = config.memory.host_budget_bytes - beside;
  device_ = config.device.kind == DeviceConfig::Kind::cuda ? make_cuda_device(config.device.index, 0, room)
                                                           : make_cpu_device(0, room);
  // Some point will have the CPU compute of them.
  const bool near_pages = config.offload.near_pages && config.model.experts != SliceEncoding::dense &&
                          config.device.kind == DeviceConfig::Kind::cuda;
  store_ = std::make_shared<offload::ExpertStore>(*device_, grid, near_pages);
  kept_weights_ = weights;
  budget_bytes_ = config.memory.host_budget_bytes;
  return store_;
}

void KeptExperts::drop_unfilled() {
  if (store_ && !store_->filled()) drop();
}

uint64_t KeptExperts::bytes() const {
  return store_ && store_->filled() ? store_->bytes() : 0;
}

// A point that differs from this one only in its workload needs no load.
bool KeptExperts::needed_after(size_t place, const std::string& weights, const Point& point) const {
  for (size_t i = place + 1; i < weights_.size(); ++i) {
    if (weights_[i] == weights && sweep_.points[i].overrides != point.overrides) return true;
  }
  return false;
}

void KeptExperts::drop() {
  store_.reset();
  device_.reset();
  kept_weights_.clear();
}

}  // namespace lighter::bench
