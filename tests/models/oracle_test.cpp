// The oracle: paging changes where weights are, never what is computed.
#include <doctest/doctest.h>

#include "runtime/engine/generator.h"
#include "runtime/error.h"
#include "tests/models/test_model.h"

using namespace lighter;
using namespace lighter::test;

namespace {

std::vector<int64_t> prompt_of(const std::string& name) {
  auto ids = Golden(name).read<int64_t>("input_ids");
  ids.resize(std::min<size_t>(ids.size(), 40));
  return ids;
}

using Policy = OffloadConfig::Policy;

}  // namespace

TEST_CASE(
    "paged output equals resident output bit for bit, for every architecture, policy, residency and "
    "prefetch") {
  for (const std::string name : {"llama4_scout", "llama4_maverick", "mixtral"}) {
    for (const DType dtype : {DType::fp32, DType::bf16}) {
      const auto ids = prompt_of(name);
      Config config = golden_config(name, dtype);
      config.offload.resident = 1.0;
      LoadedModel resident(config);
      REQUIRE(resident.model.plan.all_resident);
      const auto expected = resident.mixed_logits(ids, 20, 9);
      for (const Policy policy : {Policy::static_, Policy::lru, Policy::lfu}) {
        for (const double ratio : {0.0, 0.3, 0.9}) {
          for (const bool prefetch : {false, true}) {
            CAPTURE(name);
            CAPTURE(static_cast<int>(policy));
            CAPTURE(ratio);
            CAPTURE(prefetch);
            config.offload.policy = policy;
            config.offload.resident = ratio;
            config.offload.prefetch = {prefetch, 2};
            LoadedModel paged(config);
            CHECK(paged.mixed_logits(ids, 20, 9) == expected);
            const ExpertCounters counters = paged.session.counters();
            CHECK(counters.slices_used ==
                  counters.slices_resident + counters.slices_prefetched + counters.slices_missed);
            CHECK(counters.bytes_moved() > 0);
          }
        }
      }
    }
  }
}

TEST_CASE("a batch of several sequences gives each the logits that it has alone") {
  for (const std::string name : {"llama4_scout", "mixtral", "llama3"}) {
    CAPTURE(name);
    const auto ids = prompt_of(name);
    const Config config = golden_config(name, DType::fp32);
    LoadedModel alone(config);
    std::vector<std::vector<float>> expected;
    for (const size_t length : {30, 12, 21}) {
      alone.logits({ids.begin(), ids.begin() + length}, 1000);
      Step step;
      alone.session.decoder().release(0);
      expected.push_back(alone.logits({ids.begin(), ids.begin() + length + 1}, 1000));
    }
    cli::PreparedModel three = cli::prepare(config);
    three.kv.sequences = 3;
    cli::Session session(config, three, kNoProgress);
    const std::vector<size_t> lengths = {30, 12, 21};
    for (int i = 0; i < 3; ++i) {
      for (size_t begin = 0; begin < lengths[i];) {
        const auto at = static_cast<int64_t>(begin);
        const int64_t count = std::min<int64_t>(session.decoder().max_tokens_from(at), lengths[i] - begin);
        Step step;
        step.add(i, at, ids.data() + begin, count);
        session.decoder().forward(step);
        begin += count;
      }
    }
    Step batch;
    for (int i = 0; i < 3; ++i) batch.add(i, static_cast<int64_t>(lengths[i]), &ids[lengths[i]], 1);
    const at::Tensor out = session.decoder().forward(batch).contiguous();
    for (int i = 0; i < 3; ++i) {
      const int64_t vocab = out.size(1);
      const float* row = out.const_data_ptr<float>() + i * vocab;
      const float* reference = expected[i].data() + expected[i].size() - vocab;
      for (int64_t v = 0; v < vocab; ++v) CHECK(row[v] == doctest::Approx(reference[v]).epsilon(1e-4));
    }
    // The same step again writes the same keys to the same places. Chosen on the device, only the ids come back.
    const std::vector<int64_t> likeliest = session.decoder().likeliest(batch);
    REQUIRE(likeliest.size() == 3);
    for (int i = 0; i < 3; ++i) CHECK(likeliest[i] == out[i].argmax().item<int64_t>());
  }
}

TEST_CASE(
    "no run takes more than its budgets, loading included, and one that cannot fit refuses before it "
    "allocates") {
  for (const std::string name : {"llama4_scout", "mixtral", "llama3"}) {
    for (const double ratio : {0.0, 0.5, 1.0}) {
      CAPTURE(name);
      CAPTURE(ratio);
      Config config = golden_config(name, DType::bf16);
      config.offload.resident = ratio;
      const offload::Plan plan = cli::prepare(config).plan;
      // The plan's own sums as budgets: a byte more anywhere would throw.
      config.memory.gpu_budget_bytes = plan.device_bytes;
      config.memory.host_budget_bytes = plan.host_bytes;
      LoadedModel tight(config);
      tight.logits(prompt_of(name), 1000);
      CHECK(tight.session.device_peak_bytes() <= plan.device_bytes);
      CHECK(tight.session.host_peak_bytes() <= plan.host_bytes);

      // Slots for slices in transit may shrink to two; below that nothing gives.
      const uint64_t slice = 3 * 64 * 32 * dtype_size(DType::bf16);
      const uint64_t spare = plan.pager.spare_slots > 2 ? (plan.pager.spare_slots - 2) * slice : 0;
      config.memory.gpu_budget_bytes = plan.device_bytes - spare - 1;
      CHECK_FALSE(cli::prepare(config).plan.fits());
      CHECK_THROWS_AS(LoadedModel{config}, CapacityError);
    }
  }
}

TEST_CASE("a schedule decides the experts however the tokens are put into steps") {
  Config config = golden_config("llama4_scout", DType::fp32);
  LoadedModel model(config, models::uniform_schedule(4, 1, 7));
  const auto ids = prompt_of("llama4_scout");
  const auto whole = model.logits(ids, 1000);
  const auto single = model.logits(ids, 1);
  REQUIRE(whole.size() == single.size());
  for (size_t i = 0; i < whole.size(); ++i) CHECK(whole[i] == doctest::Approx(single[i]).epsilon(1e-3));
}
