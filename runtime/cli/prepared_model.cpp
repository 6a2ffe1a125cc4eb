#include "runtime/cli/prepared_model.h"

#include <algorithm>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <thread>

#include "models/architectures.h"
#include "models/decoder.h"
#include "models/quantizing_source.h"
#include "models/synthetic_source.h"
#include "models/weights.h"
#include "runtime/error.h"
#include "runtime/moe/slice_format.h"

namespace lighter::cli {
namespace {

// The CUDA context, kernels that libraries load, and what the driver keeps: measured below 0.8 GiB on Hopper.
constexpr uint64_t kCudaReserve = uint64_t{1} << 30;
// A chunk of a prompt may take this part of the device's budget: more would cost more residents than it is
// worth.
constexpr uint64_t kWorkspaceShare = 32;
// Steps of so many tokens choose nearly every expert, and compute for longer than a copy takes.
constexpr int64_t kStreamingChunk = 1024;
// For the unquantized experts that loaders hold, all together.
constexpr uint64_t kQuantizingScratch = uint64_t{1} << 30;

models::ModelSpec spec_of(const ModelConfig& config) {
  models::ModelSpec spec = config.is_synthetic() ? models::synthetic_spec(config.synthetic)
                                                 : models::read_spec(config.path / "config.json");
  if (config.layers) models::keep_layers(spec, *config.layers);
  return spec;
}

int64_t checked_slice_width(const models::ModelSpec& spec, const Config& config) {
  if (spec.moe_layers() == 0) return 0;
  if (config.offload.slice_width == 0) {
    return default_slice_width(spec.hidden, spec.expert_ffn, config.model.experts, config.model.dtype);
  }
  if (spec.expert_ffn % config.offload.slice_width != 0) {
    throw ConfigError("offload.slice_width is " + std::to_string(config.offload.slice_width) +
                      ", which does not divide the experts' FFN width of " + std::to_string(spec.expert_ffn));
  }
  return config.offload.slice_width;
}

void check_layers(const std::string& key, const LayerFormats& formats, const models::ModelSpec& spec) {
  if (formats.max_layer() < static_cast<int>(spec.layers.size())) return;
  throw ConfigError(key + " names layer " + std::to_string(formats.max_layer()) + ", but the model has " +
                    std::to_string(spec.layers.size()) + ", counted from 0");
}

models::WeightFormats weight_formats(const models::ModelSpec& spec, const ModelConfig& config,
                                     int64_t slice_width) {
  check_layers("model.shared", config.shared, spec);
  check_layers("model.attention", config.attention, spec);
  if (spec.tied_head && config.head != SliceEncoding::dense) {
    throw ConfigError(
        "model.head is " + std::string(encoding_name(config.head)) +
        ", but this model's head is its embedding too, which is not quantized; set model.head: dtype");
  }
  models::WeightFormats formats = models::dense_formats(spec, config.dtype);
  for (int layer = 0; layer < static_cast<int>(spec.layers.size()); ++layer) {
    formats.shared[layer] = config.shared.at(layer);
    formats.attention[layer] = config.attention.at(layer);
  }
  formats.head = config.head;
  formats.slice_width = slice_width;
  return formats;
}

std::optional<std::vector<double>> resident_ratios(const models::ModelSpec& spec, const Resident& resident) {
  if (std::holds_alternative<ResidentAuto>(resident)) return std::nullopt;
  std::vector<double> ratios;
  const auto* list = std::get_if<std::vector<double>>(&resident);
  if (list != nullptr && list->size() != spec.layers.size()) {
    throw ConfigError("offload.resident lists " + std::to_string(list->size()) +
                      " ratios, but the model has " + std::to_string(spec.layers.size()) + " layers");
  }
  for (size_t i = 0; i < spec.layers.size(); ++i) {
    if (spec.layers[i].moe_layer >= 0)
      ratios.push_back(list != nullptr ? (*list)[i] : std::get<double>(resident));
  }
  return ratios;
}

void check_pin(const char* what, int index, int count) {
  if (index < count) return;
  throw ConfigError("offload.pin names " + std::string(what) + " " + std::to_string(index) +
                    ", but the model has " + std::to_string(count) + (count == 0 ? "" : ", counted from 0"));
}

std::vector<ExpertId> pinned_experts(const models::ModelSpec& spec, const std::vector<PinSelector>& pins) {
  std::vector<ExpertId> pinned;
  if (!pins.empty() && spec.moe_layers() == 0) {
    throw ConfigError("offload.pin names experts, but " + spec.architecture +
                      " is a dense model and has none");
  }
  for (const PinSelector& pin : pins) {
    check_pin("layer", pin.layers.max_index(), static_cast<int>(spec.layers.size()));
    check_pin("expert", pin.experts.max_index(), spec.experts);
    for (int layer = 0; layer < static_cast<int>(spec.layers.size()); ++layer) {
      for (int expert = 0; expert < spec.experts; ++expert) {
        const ExpertId id{spec.layers[layer].moe_layer, expert};
        if (id.layer < 0 || !pin.contains(layer, expert)) continue;
        if (std::find(pinned.begin(), pinned.end(), id) == pinned.end()) pinned.push_back(id);
      }
    }
  }
  return pinned;
}

offload::PolicyKind policy_kind(OffloadConfig::Policy policy) {
  switch (policy) {
    case OffloadConfig::Policy::static_:
      return offload::PolicyKind::static_;
    case OffloadConfig::Policy::lru:
      return offload::PolicyKind::lru;
    case OffloadConfig::Policy::lfu:
      return offload::PolicyKind::lfu;
  }
  return offload::PolicyKind::lru;
}

std::vector<offload::PlanLine> fixed_lines(const PreparedModel& model, const Config& config) {
  std::map<models::WeightClass, offload::PlanLine> by_class;
  uint64_t listed_device = 0;
  for (const models::Weight& weight : models::list_weights(model.spec)) {
    const uint64_t bytes = models::weight_bytes(model.formats, weight);
    auto& line = by_class[weight.weight_class];
    const bool on_host = weight.role == models::WeightRole::embedding;
    (on_host ? line.host_bytes : line.device_bytes) += bytes;
    if (!on_host) listed_device += bytes;
  }
  std::vector<offload::PlanLine> lines;
  for (auto& [weight_class, line] : by_class) {
    line.what = models::weight_class_name(weight_class);
    if (weight_class == models::WeightClass::head && model.spec.tied_head) line.what = "head and embedding";
    if (weight_class == models::WeightClass::embedding) {
      line.host_bytes = models::LoadedWeights::host_bytes(model.spec, model.formats);
    }
    lines.push_back(line);
  }
  const uint64_t aligned = models::LoadedWeights::device_bytes(model.spec, model.formats);
  lines.push_back({"alignment", aligned - listed_device, 0});
  lines.push_back({"KV cache", model.kv.bytes(), 0});
  lines.push_back({"workspace", model.workspace_bytes, 0});
  if (model.why_eager.empty()) {
    const auto shape = decode_graph_shape(model, config);
    lines.push_back(
        {"decode graph", models::decode_graph_device_bytes(shape), models::decode_graph_host_bytes(shape)});
  }
  if (model.reserve_bytes > 0) lines.push_back({"reserve (CUDA context)", model.reserve_bytes, 0});
  return lines;
}

}  // namespace

models::DecodeGraphShape decode_graph_shape(const PreparedModel& model, const Config& config) {
  models::DecodeGraphShape shape{model.spec, model.formats, {}};
  if (model.spec.moe_layers() > 0) {
    shape.experts = {model.spec.moe_layers(), model.spec.experts,
                     static_cast<int>(model.spec.expert_ffn / model.slice_width), model.slice_bytes};
  }
  shape.encoding = config.model.experts;
  shape.slice_width = model.slice_width;
  shape.context = config.memory.context;
  shape.kv_block = model.kv.usable_block();
  shape.all_resident = model.plan.all_resident;
  shape.with_workers = model.cpu_computes();
  shape.fetches = model.spec.moe_layers() > 0 && model.miss == OffloadConfig::Miss::fetch;
  return shape;
}

// Why tokens are decoded eagerly; empty: they are not. Throws ConfigError when a graph is asked for in vain.
std::string why_eager(const PreparedModel& model, const Config& config) {
  const bool cuda = config.device.kind == DeviceConfig::Kind::cuda;
  if (config.decode == DecodeMode::eager) return "decode is eager";
  std::string why = models::why_no_decode_graph(decode_graph_shape(model, config), cuda, config.model.dtype);
  if (!why.empty() && config.decode == DecodeMode::graph) {
    throw ConfigError("decode is graph, but a decode graph cannot be had: " + why + "; set decode: auto");
  }
  using Miss = OffloadConfig::Miss;
  if (!why.empty() && config.offload.miss != Miss::automatic && config.offload.miss != Miss::fetch) {
    throw ConfigError("offload.miss is " + std::string(miss_name(config.offload.miss)) +
                      ", which needs a decode graph, but that cannot be had: " + why +
                      "; set offload.miss: auto");
  }
  return why;
}

// Sets miss and why_miss.
void choose_miss(PreparedModel& model, const Config& config) {
  using Miss = OffloadConfig::Miss;
  const bool quantized = config.model.experts != SliceEncoding::dense;
  const Miss asked = config.offload.miss;
  model.miss = asked;
  model.why_miss = "offload.miss is " + std::string(miss_name(asked));
  if (!model.why_eager.empty() || model.spec.moe_layers() == 0) {
    model.miss = Miss::fetch;
    model.why_miss = model.spec.moe_layers() == 0 ? "the model has no experts" : model.why_eager;
  } else if (asked == Miss::automatic) {
    model.miss = quantized && model.threads > 1 ? Miss::split : Miss::zero_copy;
    model.why_miss = quantized && model.threads > 1 ? "the CPU reads its memory beside the GPU's link to it"
                     : quantized                    ? "there is no core for the CPU's share"
                                                    : "the CPU computes only int8 and int4 experts";
  } else if (model.cpu_computes() && !quantized) {
    throw ConfigError(model.why_miss +
                      ", but the CPU computes only int8 and int4 experts; set model.experts, or " +
                      "offload.miss: zero_copy");
  }
}

PreparedModel prepare(const Config& config) {
  PreparedModel model;
  const bool cuda = config.device.kind == DeviceConfig::Kind::cuda;
  const DType dtype = config.model.dtype;
  model.spec = spec_of(config.model);
  if (!config.model.is_synthetic()) {
    model.stored = models::read_stored_formats(config.model.path / "config.json", model.spec);
  }
  model.slice_width = checked_slice_width(model.spec, config);
  model.formats = weight_formats(model.spec, config.model, model.slice_width);
  const bool quantized = config.model.experts != SliceEncoding::dense;
  if (model.spec.moe_layers() > 0) {
    model.slice_bytes = slice_bytes({model.spec.hidden, model.slice_width}, config.model.experts, dtype);
  } else if (quantized && config.model.experts != config.model.format) {
    throw ConfigError("model.experts asks for quantized experts, but " + model.spec.architecture +
                      " is a dense model and has none");
  }
  const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  // On CUDA a core stays free for the thread that feeds and awaits the GPU.
  model.threads = config.cpu.threads > 0 ? config.cpu.threads : std::max(1, cuda ? cores - 1 : cores);
  model.kv = models::kv_shape(model.spec, config.memory.context, config.memory.kv_block,
                              config.memory.sequences, dtype);
  models::WorkspaceShape step{0,    config.memory.context, config.memory.sequences, dtype, model.slice_width,
                              cuda, model.formats,         config.model.experts};
  model.prefill_chunk =
      config.memory.prefill_chunk > 0
          ? std::min(config.memory.prefill_chunk, config.memory.context)
          : models::default_prefill_chunk(model.spec, step, config.memory.gpu_budget_bytes / kWorkspaceShare);
  step.max_tokens = std::max<int64_t>(model.prefill_chunk, config.memory.sequences);
  model.workspace_bytes = models::workspace_bytes(model.spec, step);
  model.reserve_bytes = cuda ? kCudaReserve : 0;
  model.why_eager = why_eager(model, config);
  choose_miss(model, config);

  offload::PlanRequest request;
  request.device_budget_bytes = config.memory.gpu_budget_bytes;
  request.host_budget_bytes = config.memory.host_budget_bytes;
  request.fixed = fixed_lines(model, config);
  request.load_staging_bytes =
      models::LoadedWeights::staging_bytes(model.spec, model.formats, cuda, model.threads);
  if (model.spec.moe_layers() > 0) {
    request.grid = {model.spec.moe_layers(), model.spec.experts,
                    static_cast<int>(model.spec.expert_ffn / model.slice_width), model.slice_bytes};
  }
  request.experts_per_token = model.spec.experts_per_token;
  request.resident = resident_ratios(model.spec, config.offload.resident);
  request.policy = policy_kind(config.offload.policy);
  request.pinned = pinned_experts(model.spec, config.offload.pin);
  const bool guessable = config.offload.routing.schedule == RoutingConfig::Schedule::router;
  request.prefetch_depth = config.offload.prefetch.enabled && guessable ? config.offload.prefetch.depth : 0;
  // Attention and the shared expert of a long chunk take as long as a quarter of a layer's slices to come.
  if (model.prefill_chunk >= kStreamingChunk) {
    request.streaming_slots = static_cast<int>(request.grid.slices_per_layer() / 4);
  }
  request.load_threads = model.threads;
  if (quantized && model.spec.moe_layers() > 0 && !config.model.is_synthetic() && !model.stored) {
    // Each loader holds an unquantized expert; the quantizing itself is done by all threads.
    const uint64_t scratch = models::QuantizingSource::scratch_bytes(model.spec, dtype);
    request.load_threads =
        static_cast<int>(std::clamp<uint64_t>(kQuantizingScratch / scratch, 1, model.threads));
    request.fixed.push_back({"quantizing", 0, request.load_threads * scratch});
  }
  model.plan = offload::make_plan(request);
  return model;
}

// The head comes when all that the layers needed is free again, except for the chunk's hidden states.
int64_t logit_rows(const PreparedModel& model, const Config& config) {
  constexpr int64_t kMost = 16;  // More make the head's product no faster.
  const bool cuda = config.device.kind == DeviceConfig::Kind::cuda;
  const DType dtype = config.model.dtype;
  const uint64_t hidden_states =
      static_cast<uint64_t>(model.prefill_chunk) * model.spec.hidden * dtype_size(dtype);
  int64_t rows = std::min(kMost, model.prefill_chunk);
  while (rows > 1) {
    const models::WorkspaceShape head_alone{
        rows, 0, static_cast<int>(rows), dtype, model.slice_width, cuda, model.formats, SliceEncoding::dense};
    if (models::workspace_bytes(model.spec, head_alone) + hidden_states <= model.workspace_bytes) break;
    rows /= 2;
  }
  return rows;
}

}  // namespace lighter::cli
