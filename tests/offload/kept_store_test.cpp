// A store of experts that outlives its pager, as a sweep uses it.
#include <doctest/doctest.h>

#include <atomic>
#include <cstring>
#include <random>

#include "offload/slice_pager.h"
#include "runtime/error.h"

namespace lighter::offload {
namespace {

const ExpertGrid kGrid{3, 4, 5, 256};
constexpr uint64_t kEnough = uint64_t{1} << 20;

// Random bytes; counts how often it is asked.
class RandomSource : public SliceSource {
 public:
  RandomSource() : bytes_(kGrid.total_bytes()) {
    std::mt19937_64 engine{std::random_device{}()};
    for (std::byte& byte : bytes_) byte = static_cast<std::byte>(engine());
  }
  void read_expert(ExpertId id, std::span<std::byte* const> slices) const override {
    ++reads;
    for (int i = 0; i < kGrid.slices; ++i)
      std::memcpy(slices[i], at({id.layer, id.expert, i}), kGrid.slice_bytes);
  }
  const std::byte* at(SliceId slice) const { return bytes_.data() + kGrid.index(slice) * kGrid.slice_bytes; }

  mutable std::atomic<int> reads{0};

 private:
  std::vector<std::byte> bytes_;
};

PagerOptions options(PolicyKind policy, int residents) {
  PagerOptions options;
  options.policy = policy;
  options.residents_per_layer.assign(kGrid.layers, residents);
  options.spare_slots = 4;
  options.prefetch = false;
  options.load_threads = 2;
  return options;
}

void check_all(SlicePager& pager, const RandomSource& source) {
  const std::vector<int> everyone = {0, 1, 2, 3};
  for (int layer = 0; layer < kGrid.layers; ++layer) {
    const auto check = [&](int expert, int first, std::span<const std::byte* const> addresses) {
      for (size_t i = 0; i < addresses.size(); ++i) {
        const SliceId slice{layer, expert, first + static_cast<int>(i)};
        CHECK(std::memcmp(addresses[i], source.at(slice), kGrid.slice_bytes) == 0);
      }
    };
    pager.visit(layer, everyone, false, {{}, [] {}, check});
  }
  pager.between_steps();
}

TEST_CASE("a kept store is filled once and serves pagers of any residency and policy") {
  const RandomSource source;
  const auto home = make_cpu_device(0, kGrid.total_bytes());
  const auto store = std::make_shared<ExpertStore>(*home, kGrid);
  for (const PolicyKind policy : {PolicyKind::static_, PolicyKind::lru, PolicyKind::lfu}) {
    for (const int residents : {0, 7, 20}) {
      CAPTURE(residents);
      const auto device = make_cpu_device(kEnough, kEnough);
      SlicePager pager(*device, kGrid, options(policy, residents), store);
      pager.load(source, kNoProgress);
      check_all(pager, source);
    }
  }
  CHECK(source.reads == kGrid.layers * kGrid.experts);
  CHECK(home->host_budget().peak_bytes() == kGrid.total_bytes());
}

TEST_CASE("with a kept store, a pager enters in its own budget what its own store would take") {
  const RandomSource source;
  const auto home = make_cpu_device(0, kGrid.total_bytes());
  const auto store = std::make_shared<ExpertStore>(*home, kGrid);
  for (const PolicyKind policy : {PolicyKind::static_, PolicyKind::lru}) {
    const auto own_device = make_cpu_device(kEnough, kEnough);
    {
      SlicePager own(*own_device, kGrid, options(policy, 7));
      own.load(source, kNoProgress);
      const auto device = make_cpu_device(kEnough, kEnough);
      {
        SlicePager pager(*device, kGrid, options(policy, 7), store);
        pager.load(source, kNoProgress);
        CHECK(device->host_budget().used_bytes() == own_device->host_budget().used_bytes());
        CHECK(device->host_budget().used_bytes() == own.store().bytes());
      }
      CHECK(device->host_budget().used_bytes() == 0);
    }
    const auto small = make_cpu_device(kEnough, 100);
    CHECK_THROWS_AS(SlicePager(*small, kGrid, options(policy, 7), store), CapacityError);
    CHECK(small->host_budget().used_bytes() == 0);
  }
}

TEST_CASE("a filled store is a source of experts") {
  const RandomSource source;
  const auto home = make_cpu_device(kEnough, kEnough);
  const auto store = std::make_shared<ExpertStore>(*home, kGrid);
  CHECK_FALSE(store->filled());
  SlicePager(*home, kGrid, options(PolicyKind::lru, 3), store).load(source, kNoProgress);
  REQUIRE(store->filled());
  std::vector<std::byte> bytes(kGrid.expert_bytes());
  std::vector<std::byte*> slices;
  for (int i = 0; i < kGrid.slices; ++i) slices.push_back(bytes.data() + i * kGrid.slice_bytes);
  store->read_expert({2, 1}, slices);
  CHECK(std::memcmp(bytes.data(), source.at({2, 1, 0}), bytes.size()) == 0);
}

}  // namespace
}  // namespace lighter::offload
