#include <doctest/doctest.h>
#include <tbb/global_control.h>
#include <tbb/parallel_for.h>

#include <thread>

#include "runtime/error.h"
#include "tests/offload/pager_rig.h"

namespace lighter::offload {
namespace {

constexpr ExpertGrid kGrid{6, 16, 2, 4096};

PagerOptions static_options(int load_threads) {
  PagerOptions options;
  options.residents_per_layer.assign(kGrid.layers, 20);
  options.policy = PolicyKind::static_;
  options.load_threads = load_threads;
  return options;
}

// Makes an expert in parallel, as the synthetic weights are made: a thread that waits for its own pieces may
// meanwhile begin another expert.
class ParallelSource : public SliceSource {
 public:
  void read_expert(ExpertId expert, std::span<std::byte* const> slices) const override {
    for (size_t i = 0; i < slices.size(); ++i) {
      tbb::parallel_for(
          0, 16,
          [&](int piece) {
            const size_t length = kGrid.slice_bytes / 16;
            std::this_thread::sleep_for(std::chrono::microseconds(20));
            std::memcpy(
                slices[i] + piece * length,
                pattern_.original({expert.layer, expert.expert, static_cast<int>(i)}) + piece * length,
                length);
          },
          tbb::simple_partitioner());
    }
  }
  const PatternSource& pattern() const { return pattern_; }

 private:
  PatternSource pattern_{kGrid};
};

int wrong_slices(const SlicePager& pager, const PatternSource& source) {
  int wrong = 0;
  for (int layer = 0; layer < kGrid.layers; ++layer) {
    for (int expert = 0; expert < kGrid.experts; ++expert) {
      for (int i = 0; i < kGrid.slices; ++i) {
        const SliceId slice{layer, expert, i};
        const SliceLocation& at = pager.residency()->at(slice);
        if (at.on_device()) wrong += !source.matches(slice, at.address);
        if (pager.store().has_home(slice)) wrong += !source.matches(slice, pager.store().address(slice));
        wrong += !at.on_device() && !pager.store().has_home(slice);
      }
    }
  }
  return wrong;
}

}  // namespace

TEST_CASE("loading puts every slice where it belongs, however many threads load") {
  const PatternSource source(kGrid);
  for (const int threads : {1, 2, 5, 32}) {
    for (const PolicyKind policy : {PolicyKind::static_, PolicyKind::lru}) {
      PagerOptions options = static_options(threads);
      options.policy = policy;
      options.pinned = {{0, 3}, {5, 15}};
      const auto device = make_cpu_device(1 << 24, 1 << 24);
      SlicePager pager(*device, kGrid, options);
      pager.load(source, kNoProgress);
      CHECK(wrong_slices(pager, source) == 0);
      CHECK(pager.consistent());
    }
  }
}

TEST_CASE("a source that is parallel itself does not mix experts up in the staging memory") {
  const tbb::global_control many(tbb::global_control::max_allowed_parallelism, 8);
  const ParallelSource source;
  for (int round = 0; round < 5; ++round) {
    const auto device = make_cpu_device(1 << 24, 1 << 24);
    SlicePager pager(*device, kGrid, static_options(4));
    pager.load(source, kNoProgress);
    REQUIRE(wrong_slices(pager, source.pattern()) == 0);
  }
}

TEST_CASE("loading takes no more staging memory than was announced") {
  const tbb::global_control many(tbb::global_control::max_allowed_parallelism, 8);
  const ParallelSource source;
  for (const int threads : {1, 3}) {
    const PagerOptions options = static_options(threads);
    const uint64_t staging = load_staging_bytes(kGrid, options);
    CHECK(staging == threads * 2 * kGrid.slice_bytes);
    const uint64_t store = kGrid.slice_bytes * (kGrid.total_slices() - 20 * kGrid.layers);
    for (int round = 0; round < 2; ++round) {
      const auto device = make_cpu_device(1 << 24, store + staging);
      SlicePager pager(*device, kGrid, options);
      pager.load(source, kNoProgress);
      CHECK(pager.store().bytes() == store);
      CHECK(device->host_budget().used_bytes() == store);
      CHECK(device->host_budget().peak_bytes() <= store + staging);
    }
  }
}

TEST_CASE("big experts are staged by fewer threads, so that staging stays at one GiB or one expert") {
  const ExpertGrid big{1, 2, 2, uint64_t{300} << 20};
  PagerOptions options;
  options.residents_per_layer = {3};
  options.policy = PolicyKind::static_;
  options.load_threads = 16;
  CHECK(load_staging_bytes(big, options) == uint64_t{600} << 20);
  const ExpertGrid huge{1, 2, 2, uint64_t{3} << 30};
  CHECK(load_staging_bytes(huge, options) == uint64_t{6} << 30);
  options.policy = PolicyKind::lru;
  CHECK(load_staging_bytes(huge, options) == 0);
}

TEST_CASE(
    "at the start the residents leave out an expert's first slices for the link, and more last ones for the "
    "CPU") {
  const ExpertGrid grid{2, 3, 16, 256};
  PagerOptions options = static_options(0);
  options.pinned = {{1, 2}};
  options.residents_per_layer = {24, 16 + 16};  // half of each expert that is not pinned
  const InitialResidency residency = initial_residency(grid, options);
  for (int layer = 0; layer < 2; ++layer) {
    for (int expert = 0; expert < 3; ++expert) {
      for (int slice = 0; slice < 16; ++slice) {
        CAPTURE(slice);
        const bool resident = (layer == 1 && expert == 2) || (slice >= 2 && slice < 10);
        CHECK(std::ranges::count(residency.layers[layer], SliceId{layer, expert, slice}) == resident);
      }
    }
  }
}

TEST_CASE("progress reaches the whole, one call at a time, and may stop the loading") {
  const PatternSource source(kGrid);
  const auto device = make_cpu_device(1 << 24, 1 << 24);
  {
    SlicePager pager(*device, kGrid, static_options(4));
    uint64_t last = 0;
    pager.load(source, [&](const std::string& what, uint64_t done, uint64_t total) {
      if (what != "loading experts") return;
      CHECK(done == last + kGrid.expert_bytes());
      CHECK(total == kGrid.total_bytes());
      last = done;
    });
    CHECK(last == kGrid.total_bytes());
  }
  SlicePager pager(*device, kGrid, static_options(4));
  const auto interrupt = [](const std::string&, uint64_t done, uint64_t total) {
    if (done > total / 2) throw Interrupted();
  };
  CHECK_THROWS_AS(pager.load(source, interrupt), Interrupted);
}

TEST_CASE("a source's error is the loader's error") {
  class Damaged : public SliceSource {
   public:
    void read_expert(ExpertId expert, std::span<std::byte* const>) const override {
      if (expert.layer == 2) throw CheckpointError("layer 2 is damaged");
    }
  };
  const auto device = make_cpu_device(1 << 24, 1 << 24);
  SlicePager pager(*device, kGrid, static_options(3));
  CHECK_THROWS_AS(pager.load(Damaged(), kNoProgress), CheckpointError);
}

}  // namespace lighter::offload
