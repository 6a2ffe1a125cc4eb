// The pager under load: a million random requests, of every policy, with and without prefetch and streaming,
// with few and many slots. Under TSan and ASan this is the test that counts.
#include <doctest/doctest.h>

#include <array>

#include "tests/offload/pager_rig.h"

namespace lighter::offload {
namespace {

struct Load {
  ExpertGrid grid;
  PagerOptions options;
  Traffic traffic;
};

Load draw_load(std::mt19937& random) {
  const auto between = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  Load load;
  load.grid = {between(1, 6), between(2, 16), between(1, 6), static_cast<uint64_t>(between(1, 16)) * 8};
  const int all = static_cast<int>(load.grid.slices_per_layer());
  for (int layer = 0; layer < load.grid.layers; ++layer) {
    load.options.residents_per_layer.push_back(between(all / 2, all));
  }
  load.options.spare_slots = between(1, 1 << between(1, 7));
  load.options.policy = std::array{PolicyKind::static_, PolicyKind::lru, PolicyKind::lfu}[between(0, 2)];
  load.options.prefetch = between(0, 3) > 0;
  load.options.load_threads = between(1, 2);
  load.traffic = {between(0, 2) / 20.0, between(0, 2) / 3.0, 0.8, between(1, 2), between(1, 6), 0.1};
  return load;
}

}  // namespace

TEST_CASE("a million random requests get the right bytes, and every one is counted") {
  constexpr uint64_t kRequests = 1'000'000;
  constexpr uint64_t kRequestsOfOnePager = 12'500;
  std::mt19937 random(20261122);
  uint64_t requests = 0;
  uint64_t prefetched = 0;
  int pagers = 0;
  for (; requests < kRequests; ++pagers) {
    const Load load = draw_load(random);
    PagerRig rig(load.grid, load.options, pagers % 10 == 9);
    while (rig.failure().empty() && rig.pager().counters().slices_used < kRequestsOfOnePager) {
      rig.run(draw_step(load.grid, load.traffic, random));
    }
    requests += rig.pager().counters().slices_used;
    prefetched += rig.pager().counters().slices_prefetched;
    CAPTURE(pagers);
    REQUIRE(rig.failure() == "");
    CHECK(rig.device().device_budget().peak_bytes() == device_bytes_for(load.grid, load.options));
    CHECK(rig.device().host_budget().peak_bytes() <= rig.device().host_budget().limit_bytes());
  }
  CHECK(pagers >= 20);
  MESSAGE(requests << " requests to " << pagers << " pagers, " << prefetched << " answered ahead");
}

}  // namespace lighter::offload
