// Traces of real models: what is recorded is what was run, and a replay counts what the pager counted.
#include <doctest/doctest.h>

#include <cmath>

#include "offload/replay.h"
#include "runtime/cli/trace_recorder.h"
#include "runtime/float_convert.h"
#include "tests/models/test_model.h"
#include "tests/runtime/yaml_file.h"

using namespace lighter;
using namespace lighter::test;
using offload::Trace;

namespace {

offload::TraceHeader header_of(const cli::PreparedModel& model) {
  offload::TraceHeader header{"golden",
                              "fp32",
                              {},
                              model.spec.experts,
                              model.spec.experts_per_token,
                              static_cast<int>(model.spec.expert_ffn / model.slice_width),
                              1000,
                              {1, 2, 4}};
  for (size_t i = 0; i < model.spec.layers.size(); ++i) {
    if (model.spec.layers[i].moe_layer >= 0) header.layers.push_back(static_cast<int>(i));
  }
  return header;
}

Trace record(LoadedModel& model, const std::vector<int64_t>& ids, int64_t chunk) {
  const YamlFile folder("");
  const offload::TraceHeader header = header_of(model.model);
  offload::TraceWriter writer(folder.folder / "t", header);
  cli::TraceRecorder recorder(header, writer);
  model.session.decoder().observe(&recorder);
  model.logits(ids, chunk);
  model.session.decoder().observe(nullptr);
  writer.finish();
  return Trace::read(folder.folder / "t");
}

}  // namespace

TEST_CASE("a trace holds the experts that transformers chose, and the logits they were chosen by") {
  for (const std::string name : {"llama4_scout", "llama4_maverick", "mixtral"}) {
    CAPTURE(name);
    const auto ids = Golden(name).read<int64_t>("input_ids");
    const auto routing = Golden(name).read<int32_t>("routing");
    LoadedModel model(golden_config(name, DType::fp32));
    for (const int64_t chunk : {1, 13}) {
      const Trace trace = record(model, ids, chunk);
      REQUIRE(trace.tokens() == ids.size());
      CHECK(trace.header() == header_of(model.model));
      const int k = trace.header().experts_per_token;
      size_t differ = 0;
      size_t not_best = 0;
      for (int layer = 0; layer < trace.header().grid().layers; ++layer) {
        for (size_t token = 0; token < ids.size(); ++token) {
          const auto experts = trace.experts(token, layer);
          const auto best = offload::top_experts(trace.router_logits(token, layer), k);
          for (int i = 0; i < k; ++i) {
            differ += experts[i] != routing[(layer * ids.size() + token) * k + i];
            not_best += experts[i] != best[i];
          }
        }
      }
      CHECK(differ == 0);
      CHECK(not_best == 0);
    }
  }
}

TEST_CASE(
    "guesses are recorded where an earlier MoE layer can make them, and lean to the layer's own logits") {
  LoadedModel model(golden_config("llama4_maverick", DType::fp32));  // every second layer has experts
  const Trace trace = record(model, Golden("llama4_maverick").read<int64_t>("input_ids"), 13);
  REQUIRE(trace.header().layers == std::vector<int>{1, 3});
  for (const int depth : {1, 2, 4}) {
    CHECK(trace.guess_logits(5, 0, depth).empty());
    CHECK(trace.guess_logits(5, 1, depth).size() == (depth == 2 ? 8 : 0));
  }
  double product = 0;
  double squares = 0;
  double guess_squares = 0;
  for (size_t token = 0; token < trace.tokens(); ++token) {
    for (int expert = 0; expert < 8; ++expert) {
      const double logit = fp16_to_fp32(trace.router_logits(token, 1)[expert]);
      const double guess = fp16_to_fp32(trace.guess_logits(token, 1, 2)[expert]);
      product += logit * guess;
      squares += logit * logit;
      guess_squares += guess * guess;
    }
  }
  CHECK(product / std::sqrt(squares * guess_squares) > 0.3);
}

TEST_CASE("a replay counts exactly what the pager counted at one token a step, for every policy") {
  using Policy = OffloadConfig::Policy;
  const std::vector<std::pair<Policy, offload::PolicyKind>> policies = {
      {Policy::static_, offload::PolicyKind::static_},
      {Policy::lru, offload::PolicyKind::lru},
      {Policy::lfu, offload::PolicyKind::lfu}};
  for (const std::string name : {"llama4_scout", "llama4_maverick", "mixtral"}) {
    const auto ids = Golden(name).read<int64_t>("input_ids");
    for (const auto& [policy, kind] : policies) {
      for (const double resident : {0.3, 0.9}) {
        CAPTURE(name);
        CAPTURE(static_cast<int>(policy));
        CAPTURE(resident);
        Config config = golden_config(name, DType::fp32);
        config.offload.policy = policy;
        config.offload.resident = resident;
        config.offload.prefetch.enabled = false;
        config.cpu.threads = 1;  // Single tokens of a tiny model: a team of threads only waits.
        LoadedModel model(config);
        const Trace trace = record(model, ids, 1);
        const ExpertCounters counters = model.session.counters();
        const auto& residents = model.model.plan.pager.residents_per_layer;
        const offload::ReplayCounts counts = offload::replay(trace, residents, kind, 0).all;
        CHECK(counts.hit_rate() == counters.hit_rate());
        CHECK(counts.used == counters.slices_used);
        CHECK(counts.resident == counters.slices_resident);
        CHECK(counts.missed == counters.slices_missed);
        CHECK(residents == offload::residents_for(trace.header().grid(), resident));
      }
    }
  }
}
