#include "runtime/cli/quantize.h"

#include <tbb/global_control.h>

#include <algorithm>
#include <initializer_list>

#include "models/model_quantizer.h"
#include "runtime/bytes.h"
#include "runtime/cli/session.h"
#include "runtime/error.h"

namespace lighter::cli {
namespace {

// Whether any weight that the model has will be in one of these.
bool any_in(const models::StoredFormats& formats, const models::ModelSpec& spec,
            std::initializer_list<SliceEncoding> encodings) {
  const auto is_one = [&](SliceEncoding encoding) {
    return std::ranges::find(encodings, encoding) != encodings.end();
  };
  return (spec.moe_layers() > 0 && is_one(formats.experts)) ||
         std::ranges::any_of(models::list_weights(spec), [&](const models::Weight& weight) {
           return is_one(formats.weights.of(weight));
         });
}

models::StoredFormats formats_of(const PreparedModel& model, const Config& config) {
  if (config.model.is_synthetic()) {
    throw ConfigError("synthetic weights are drawn quantized; set model.path to a model's folder");
  }
  if (model.stored) throw ConfigError(config.model.path.string() + " is quantized already");
  models::StoredFormats formats{model.formats, config.model.experts};
  if (!any_in(formats, model.spec, {SliceEncoding::int8, SliceEncoding::int4})) {
    throw ConfigError(
        "nothing is to be quantized; set model.format, or model.experts, model.shared, model.attention or "
        "model.head");
  }
  return formats;
}

// What it takes, all at once.
struct Needs {
  uint64_t workspace = 0, device = 0, host = 0;
};

Needs needs_of(const Config& config, const PreparedModel& model, int64_t tokens) {
  using models::LoadedWeights;
  using models::ModelQuantizer;
  const DType dtype = config.model.dtype;
  const models::WeightFormats dense = models::dense_formats(model.spec, dtype);
  const bool cuda = config.device.kind == DeviceConfig::Kind::cuda;
  Needs needs;
  needs.workspace = model.workspace_bytes + ModelQuantizer::device_bytes(model.spec, dtype, tokens);
  needs.device = model.reserve_bytes + needs.workspace + model.kv.bytes() +
                 LoadedWeights::device_bytes(model.spec, dense);
  needs.host = ModelQuantizer::host_bytes(model.spec) + ModelQuantizer::expert_bytes(model.spec, dtype) +
               LoadedWeights::host_bytes(model.spec, dense) +
               LoadedWeights::staging_bytes(model.spec, dense, cuda, model.threads);
  return needs;
}

void check_budget(const std::string& key, uint64_t needs, uint64_t budget, int64_t tokens,
                  const std::string& otherwise) {
  if (needs <= budget) return;
  const std::string text = tokens == 0 ? "" : " with " + std::to_string(tokens) + " tokens of text";
  throw CapacityError("quantizing" + text + " needs " + format_bytes(needs) + ", more than " + key +
                      ", which is " + format_bytes(budget) + "; raise it" + otherwise);
}

}  // namespace

bool needs_text(const Config& config, const PreparedModel& model) {
  return any_in(formats_of(model, config), model.spec, {SliceEncoding::int4});
}

QuantizeReport quantize(const Config& config, const PreparedModel& model,
                        const std::vector<std::vector<int64_t>>& texts, const std::filesystem::path& out,
                        const Progress& progress) {
  const models::ModelSpec& spec = model.spec;
  const DType dtype = config.model.dtype;
  const models::StoredFormats formats = formats_of(model, config);
  int64_t tokens = 0;
  for (const auto& text : texts) tokens += static_cast<int64_t>(text.size());

  // What is cheap to find wrong comes first.
  const Needs needs = needs_of(config, model, tokens);
  check_budget("memory.gpu_budget", needs.device, config.memory.gpu_budget_bytes, tokens,
               ", or take a shorter text (--tokens) or a smaller memory.context");
  check_budget("memory.host_budget", needs.host, config.memory.host_budget_bytes, tokens, "");
  const models::CheckpointSource source(config.model.path, spec, dtype, spec.expert_ffn);
  models::PackedFolderWriter writer(out, config.model.path, source, spec, formats);
  const tbb::global_control threads(tbb::global_control::max_allowed_parallelism, model.threads + 1);
  const auto device = make_device(config);
  device->device_budget().take(model.reserve_bytes, "the reserve");
  device->host_budget().take(models::ModelQuantizer::host_bytes(spec), "what is quantized");
  const TorchScope torch(*device, needs.workspace, model.threads);
  KvCache kv(*device, model.kv);
  const Buffer expert = device->allocate_host(models::ModelQuantizer::expert_bytes(spec, dtype), "an expert");
  models::LoadedWeights weights(*device, spec, source, models::dense_formats(spec, dtype), progress);
  models::ModelQuantizer quantizer(spec, source, weights, kv, *device, dtype, formats,
                                   {expert.data(), expert.bytes()});
  quantizer.run(texts, model.prefill_chunk, writer, progress);
  writer.finish();
  QuantizeReport report;
  report.bytes_before = source.checkpoint().total_bytes();
  report.bytes = writer.written_bytes();
  report.workspace_bytes = torch.workspace_bytes();
  report.workspace_peak_bytes = torch.peak_bytes();
  if (formats.experts == SliceEncoding::int4)
    report.experts_short_of_text = quantizer.experts_short_of_text();
  return report;
}

}  // namespace lighter::cli
