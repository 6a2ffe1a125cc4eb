// The pager with tensors around it: what it computes, with and without the CPU's part.
#include "offload/expert_pager.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/norm.h>
#include <doctest/doctest.h>

#include <cstring>
#include <random>

#include "runtime/moe/resident_experts.h"
#include "runtime/torch/tensors.h"
#include "tests/runtime/random_slice.h"

namespace lighter::offload {
namespace {

constexpr int64_t kHidden = 256, kWidth = 256;
constexpr uint64_t kRoom = uint64_t{1} << 30;

class RandomSlices : public SliceSource {
 public:
  RandomSlices(const ExpertGrid& grid, SliceEncoding encoding) : grid_(grid), encoding_(encoding) {}

  void read_expert(ExpertId expert, std::span<std::byte* const> slices) const override {
    for (int i = 0; i < grid_.slices; ++i) {
      const auto seed = static_cast<unsigned>(3 * grid_.index({expert.layer, expert.expert, i}));
      const RandomSlice slice(encoding_, kHidden, kWidth, seed);
      std::memcpy(slices[i], slice.bytes.data(), slice.bytes.size());
    }
  }

 private:
  const ExpertGrid grid_;
  const SliceEncoding encoding_;
};

MoeStep random_step(int64_t tokens, int experts, int64_t k, WeightOn weight_on, unsigned seed) {
  const auto copy = [](const std::vector<float>& values, at::IntArrayRef shape) {
    return at::from_blob(const_cast<float*>(values.data()), shape, at::kFloat).clone();
  };
  std::mt19937 random(seed);
  std::vector<int64_t> chosen;
  for (int64_t i = 0; i < tokens; ++i) {
    const auto first = static_cast<int64_t>(random() % experts);
    for (int64_t j = 0; j < k; ++j) chosen.push_back((first + 3 * j) % experts);
  }
  MoeStep step;
  step.hidden = copy(normal(tokens * kHidden, 1, seed), {tokens, kHidden});
  step.experts = at::from_blob(chosen.data(), {tokens, k}, at::kLong).clone();
  step.weights = copy(normal(tokens * k, 1, seed + 1), {tokens, k});
  step.weight_on = weight_on;
  return step;
}

PagerOptions static_residents(std::vector<int> per_layer) {
  PagerOptions options;
  options.residents_per_layer = std::move(per_layer);
  options.spare_slots = 4;
  options.policy = PolicyKind::static_;
  options.prefetch = false;
  return options;
}

BatchShareOptions fixed_share(SliceEncoding encoding, double device_share) {
  BatchShareOptions share;
  share.encoding = encoding;
  share.hidden = kHidden;
  share.slice_width = kWidth;
  share.device_share = device_share;
  share.follow = false;
  share.threads = 1;
  return share;
}

double relative_error(const at::Tensor& a, const at::Tensor& b) {
  return a.sub(b).norm().item<double>() / b.norm().item<double>();
}

}  // namespace

TEST_CASE("what the CPU takes over changes a layer's output by rounding alone, and counts") {
  for (const SliceEncoding encoding : kEncodings) {
    const SliceShape shape{kHidden, kWidth};
    const ExpertGrid grid{2, 4, 3, slice_bytes(shape, encoding, DType::fp32)};
    const auto device = make_cpu_device(kRoom, kRoom);
    const RandomSlices source(grid, encoding);
    ResidentExperts resident(*device, grid, make_quantized_format(shape, encoding));
    resident.load(source, kNoProgress);
    const PagerOptions options = static_residents({6, 5});
    for (const double device_share : {0.0, 0.4, 1.0}) {
      for (const WeightOn weight_on : {WeightOn::input, WeightOn::output}) {
        for (const int64_t k : {1, 2}) {
          CAPTURE(encoding_name(encoding));
          CAPTURE(device_share);
          CAPTURE(k);
          ExpertPager pager(*device, grid, make_quantized_format(shape, encoding), options, 0,
                            fixed_share(encoding, device_share));
          pager.load(source, kNoProgress);
          for (int layer = 0; layer < grid.layers; ++layer) {
            // The last has more tokens of an expert than the CPU takes: the device does everything.
            for (const int64_t tokens : {int64_t{2}, int64_t{7}, int64_t{20}, int64_t{300}}) {
              const MoeStep step =
                  random_step(tokens, grid.experts, k, weight_on, static_cast<unsigned>(tokens + k));
              at::Tensor expected = at::empty({tokens, kHidden}), out = at::empty({tokens, kHidden});
              resident.enqueue(layer, step, expected);
              const ExpertCounters before = pager.counters();
              pager.enqueue(layer, step, out);
              const ExpertCounters did = pager.counters() - before;
              const uint64_t missed = did.slices_used - did.slices_resident;
              // As many slices of every expert go to the CPU, so of the chosen ones' not exactly the share.
              if (device_share == 1 || tokens == 300) {
                CHECK(at::equal(out, expected));
                CHECK(did.cpu_bytes == 0);
              } else {
                // The CPU weighs an input after quantizing it, the device before.
                CHECK(relative_error(out, expected) < 1e-4);
                CHECK(did.cpu_bytes <= missed * grid.slice_bytes);
                CHECK(did.cpu_bytes > 0);
                // The step before has streamed a few of layer 1 ahead.
                if (device_share == 0 && layer == 0) CHECK(did.cpu_bytes == missed * grid.slice_bytes);
              }
            }
          }
          pager.between_steps();
        }
      }
    }
  }
}

TEST_CASE("of experts with many and with few tokens the CPU takes over the latter") {
  const SliceShape shape{kHidden, kWidth};
  const SliceEncoding encoding = SliceEncoding::int8;
  const ExpertGrid grid{1, 4, 2, slice_bytes(shape, encoding, DType::fp32)};
  const auto device = make_cpu_device(kRoom, kRoom);
  const RandomSlices source(grid, encoding);
  ResidentExperts resident(*device, grid, make_quantized_format(shape, encoding));
  resident.load(source, kNoProgress);
  ExpertPager pager(*device, grid, make_quantized_format(shape, encoding), static_residents({0}), 0,
                    fixed_share(encoding, 0));
  pager.load(source, kNoProgress);
  struct Case {
    std::vector<int64_t> tokens;  // of each expert
    uint64_t taken;
  };
  const std::vector<Case> cases = {
      {{16, 1, 5, 16}, 4}, {{17, 1, 5, 40}, 2}, {{17, 17, 5, 40}, 0}, {{0, 30, 3, 0}, 1}};
  for (const Case& c : cases) {
    std::vector<int64_t> chosen;
    for (int64_t expert = 0; expert < 4; ++expert) chosen.insert(chosen.end(), c.tokens[expert], expert);
    const auto tokens = static_cast<int64_t>(chosen.size());
    MoeStep step = random_step(tokens, grid.experts, 1, WeightOn::input, 9);
    step.experts = at::from_blob(chosen.data(), {tokens, 1}, at::kLong).clone();
    at::Tensor expected = at::empty({tokens, kHidden}), out = at::empty({tokens, kHidden});
    resident.enqueue(0, step, expected);
    const ExpertCounters before = pager.counters();
    pager.enqueue(0, step, out);
    CHECK(relative_error(out, expected) < 1e-5);
    CHECK((pager.counters() - before).cpu_bytes == c.taken * grid.slices * grid.slice_bytes);
    pager.between_steps();
  }
}

}  // namespace lighter::offload
