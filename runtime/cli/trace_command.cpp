#include <algorithm>
#include <cstdio>

#include "runtime/bytes.h"
#include "runtime/cli/commands.h"
#include "runtime/cli/console.h"
#include "runtime/cli/model_config.h"
#include "runtime/cli/model_text.h"
#include "runtime/cli/session.h"
#include "runtime/cli/text_windows.h"
#include "runtime/cli/trace_recorder.h"
#include "runtime/engine/generator.h"
#include "runtime/error.h"
#include "runtime/moe/slice_format.h"

namespace lighter::cli {
namespace {

const std::vector<int> kDepths = {1, 2, 4};

std::string model_name(const ModelConfig& model) {
  if (model.is_synthetic()) return "synthetic " + model.synthetic;
  return std::filesystem::absolute(model.path).lexically_normal().filename().string();
}

offload::TraceHeader make_header(const Config& config, const PreparedModel& model) {
  const models::ModelSpec& spec = model.spec;
  offload::TraceHeader header;
  header.model = model_name(config.model);
  header.dtype = dtype_name(config.model.dtype);
  for (int layer = 0; layer < static_cast<int>(spec.layers.size()); ++layer) {
    if (spec.layers[layer].moe_layer >= 0) header.layers.push_back(layer);
  }
  header.experts = spec.experts;
  header.experts_per_token = spec.experts_per_token;
  header.slices = static_cast<int>(spec.expert_ffn / model.slice_width);
  header.slice_bytes = model.slice_bytes;
  header.depths = kDepths;
  return header;
}

// Every token that the text's windows feed to the model.
void run_text(Session& session, const TextWindows& text, int64_t chunk) {
  models::Decoder& decoder = session.decoder();
  ProgressLine progress(ProgressUnit::tokens);
  const auto total = static_cast<uint64_t>(text.tokens);
  uint64_t done = 0;
  progress("tracing", 0, total);
  for (const TextWindow& window : text.windows) {
    decoder.release(0);
    const auto length = static_cast<int64_t>(window.inputs.size());
    for (int64_t begin = 0; begin < length;) {
      const int64_t count = std::min({chunk, decoder.max_tokens_from(begin), length - begin});
      Step step;
      step.add(0, begin, window.inputs.data() + begin, count);
      decoder.forward(step);
      begin += count;
      progress("tracing", done += static_cast<uint64_t>(count), total);
    }
  }
}

// A prompt, and what the model makes of it.
void run_prompt(Session& session, const ModelText& text, const GenerateRequest& request) {
  Generator generator(session.decoder(), text.tokenizer_or_null(), interrupted());
  ProgressLine progress(ProgressUnit::tokens);
  uint64_t tokens = 0;
  const auto result = generator.generate(request, [&](const std::string&) {
    progress("generating", ++tokens, static_cast<uint64_t>(request.max_tokens));
  });
  if (result.finish == FinishReason::interrupted) throw Interrupted();
}

}  // namespace

int trace_command(const TraceOptions& options) {
  const Config config = load_model_config(options.common.config, options.common.overrides);
  const PreparedModel model = prepare(config);
  if (model.spec.moe_layers() == 0) {
    throw ConfigError(model.spec.architecture + " is a dense model: there is no routing to trace");
  }
  TextWindows text;
  if (!options.text.empty()) {
    const auto limit = options.tokens >= 0 ? std::optional<int64_t>(options.tokens) : std::nullopt;
    text = load_text_windows(options.text, config, limit);
  }
  const ModelText model_text = load_text(config.model);
  GenerateRequest request;
  if (options.text.empty()) {
    request = make_request(config, model, model_text, options.prompt, options.max_tokens);
  }
  const offload::TraceHeader header = make_header(config, model);
  offload::TraceWriter writer(options.out, header);
  TraceRecorder recorder(header, writer);
  ProgressLine progress;
  Session session(config, model, std::ref(progress));
  progress.finish();
  session.decoder().observe(&recorder);
  if (!options.text.empty()) {
    run_text(session, text, model.prefill_chunk);
  } else {
    run_prompt(session, model_text, request);
  }
  session.decoder().observe(nullptr);
  if (writer.tokens() == 0) throw ConfigError("nothing was run, so there is nothing to trace");
  writer.finish();
  if (options.common.json) {
    std::printf("{\"tokens\": %llu, \"bytes\": %llu}\n", static_cast<unsigned long long>(writer.tokens()),
                static_cast<unsigned long long>(writer.bytes()));
  } else {
    std::fprintf(stderr, "%llu tokens, %s in %s\n", static_cast<unsigned long long>(writer.tokens()),
                 format_bytes(writer.bytes()).c_str(), options.out.c_str());
  }
  return 0;
}

}  // namespace lighter::cli
