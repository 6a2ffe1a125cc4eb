// Decoding one sequence, with whole models. On a GPU (LIGHTER_TEST_DEVICE=cuda) single tokens go through the
// CUDA graph; on the CPU the same promises are kept eagerly.
#include <doctest/doctest.h>

#include "tests/models/small_checkpoint.h"

using namespace lighter;
using namespace lighter::test;

namespace {

using Miss = OffloadConfig::Miss;
using Policy = OffloadConfig::Policy;

// What the graph's kernels take: rows of 1024 values, heads of 64.
constexpr SmallSizes kDecodable{1024, 512, 1024, 64, 16, 4};

}  // namespace

TEST_CASE(
    "single tokens get the logits of eager decoding, and with slices read from host memory those of all "
    "resident ones "
    "bit for bit") {
  const bool cuda = test_device() == DeviceConfig::Kind::cuda;
  for (const std::string name : {"llama4_maverick", "mixtral"}) {
    const SmallCheckpoint checkpoint(name, kDecodable);
    const auto& spec = checkpoint.spec;
    const auto schedule = models::uniform_schedule(spec.experts, spec.experts_per_token, 5);
    const auto ids = some_ids(spec.vocab);
    for (const SliceEncoding format : {SliceEncoding::dense, SliceEncoding::int8, SliceEncoding::int4}) {
      CAPTURE(name);
      CAPTURE(encoding_name(format));
      Config config = checkpoint.config(DType::bf16);
      config.memory.gpu_budget_bytes = uint64_t{cuda ? 2048u : 256u} << 20;
      config.memory.host_budget_bytes = uint64_t{512} << 20;
      if (format != SliceEncoding::dense) set_format(config, format);
      ExpertCounters counters;
      const auto logits = [&](DecodeMode decode, double resident, Miss miss,
                              Policy policy = Policy::static_) {
        config.decode = decode;
        config.offload.resident = resident;
        config.offload.miss = miss;
        config.offload.policy = policy;
        LoadedModel model(config, schedule);
        if (cuda && decode == DecodeMode::graph) REQUIRE(model.model.why_eager == "");
        const auto result = model.mixed_logits(ids, 12, 9);
        counters = model.session.counters();
        return result;
      };
      const DecodeMode graph = cuda ? DecodeMode::graph : DecodeMode::automatic;
      const auto eager = logits(DecodeMode::eager, 1.0, Miss::automatic);
      const auto resident = logits(graph, 1.0, Miss::automatic);
      // The graph keeps its sums in fp32, eager decoding rounds them to bf16.
      CHECK(relative_error(resident, eager) < 0.03);
      // Residents that change behind the steps change no result.
      for (const Policy policy : {Policy::lru, Policy::lfu}) {
        CHECK(logits(graph, 0.5, cuda ? Miss::zero_copy : Miss::automatic, policy) == resident);
        CHECK(counters.evictions > 0);
      }
      for (const double ratio : {0.0, 0.5}) {
        CAPTURE(ratio);
        CHECK(logits(graph, ratio, cuda ? Miss::zero_copy : Miss::automatic) == resident);
        if (cuda && format != SliceEncoding::dense) {
          for (const Miss miss : {Miss::cpu, Miss::split}) {
            CAPTURE(miss_name(miss));
            CHECK(relative_error(logits(graph, ratio, miss), resident) < 0.01);
          }
        }
      }
    }
  }
}
