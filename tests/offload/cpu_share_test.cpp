#include "offload/cpu_share.h"

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <random>
#include <thread>

#include "runtime/error.h"
#include "runtime/kernels/decode.h"
#include "runtime/moe/share_control.h"
#include "runtime/quant/slice_reference.h"
#include "runtime/step_number.h"
#include "tests/message_of.h"
#include "tests/offload/posted_x.h"
#include "tests/runtime/random_slice.h"

namespace lighter::offload {
namespace {

constexpr int64_t kHidden = 640, kWidth = 256;
constexpr int kExperts = 3, kSlices = 4;

// One layer of experts, some of whose slices a device has.
struct Layer {
  explicit Layer(SliceEncoding encoding, unsigned seed)
      : grid{1, kExperts, kSlices, packed_slice_bytes(encoding, kHidden, kWidth)}, encoding(encoding) {
    std::mt19937 random(seed);
    places.version = 1;
    for (int i = 0; i < kExperts * kSlices; ++i) {
      slices.push_back(std::make_unique<RandomSlice>(encoding, kHidden, kWidth, seed + 10 * i));
      const std::byte* bytes = slices.back()->bytes.data();
      places.device.push_back(random() % 3 == 0 ? bytes : nullptr);
      places.host.push_back(bytes);
    }
  }

  // What the missed columns of these experts make from column `first` of them all on.
  std::vector<double> missed_sum(const std::vector<float>& x, const std::vector<int>& experts,
                                 const std::vector<float>& weights, int64_t first) const {
    std::vector<double> sum(kHidden, 0.0);
    for (int e = 0; e < kExperts; ++e) {
      for (size_t i = 0; i < experts.size(); ++i) {
        if (experts[i] != e) continue;
        std::vector<double> scaled = slice_reference::quantized(encoding, doubles(x));
        for (double& value : scaled) value *= weights[i];
        for (int s = 0; s < kSlices; ++s) {
          if (places.device[e * kSlices + s] != nullptr) continue;
          const int64_t skipped = std::min(first, kWidth);
          first -= skipped;
          const RandomSlice& slice = *slices[e * kSlices + s];
          auto hidden = slice_reference::gate_up(slice.layout, slice.bytes.data(), scaled);
          std::fill_n(hidden.begin(), skipped, 0.0);
          const auto out = slice_reference::down(slice.layout, slice.bytes.data(),
                                                 slice_reference::quantized(encoding, hidden));
          for (int64_t row = 0; row < kHidden; ++row) sum[row] += out[row];
        }
      }
    }
    return sum;
  }
  int missed(const std::vector<int>& experts) const {
    int count = 0;
    for (const int e : experts) {
      for (int s = 0; s < kSlices; ++s) count += places.device[e * kSlices + s] == nullptr;
    }
    return count;
  }

  ExpertGrid grid;
  SliceEncoding encoding;
  std::vector<std::unique_ptr<RandomSlice>> slices;
  SlicePlaces places;
};

bool becomes(const uint32_t* flag, uint32_t step) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (std::atomic_ref(*const_cast<uint32_t*>(flag)).load(std::memory_order_acquire) != step) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::yield();
  }
  return true;
}

CpuExpertsOptions two_threads() {
  CpuExpertsOptions options;
  options.threads = 2;
  return options;
}

}  // namespace

TEST_CASE("the CPU computes just the missed columns that the device leaves to it in the step") {
  unsigned seed = 77;
  for (const auto encoding : kEncodings) {
    Layer layer(encoding, seed += 1000);
    std::atomic<unsigned> shares_of_device[kStepsAtOnce] = {};
    const MissMailboxShape shape{1, 1, kHidden, 2, group_size(encoding)};
    alignas(128) static std::byte memory[16384];
    REQUIRE(MissMailbox::bytes(shape) <= sizeof(memory));
    const MissMailbox mailbox(memory, shape);
    CpuShare share(layer.grid, encoding, kHidden, kWidth, WeightOn::input, two_threads());
    share.start({mailbox, &layer.places, shares_of_device, {}}, 1);
    uint32_t step = 0;
    for (const unsigned device_share : {0u, 20000u, 41000u, 65536u}) {
      shares_of_device[slot_of(step + 1)] = device_share;
      shares_of_device[slot_of(step + 2)] = 65536 - device_share;  // another step's
      const auto x = normal(kHidden, 1, seed + device_share);
      const std::vector<int> experts = {2, 0};
      const std::vector<float> weights = {0.7f, 0.4f};
      const MissSlot slot = mailbox.slot(0);
      std::vector<float> posted;
      for (const float value : x) posted.push_back(4 * value);
      quantize_as_posted(posted, shape.group, slot);
      *slot.factors = 0.25f;
      std::copy(experts.begin(), experts.end(), slot.experts);
      std::copy(weights.begin(), weights.end(), slot.weights);
      *slot.tokens = 1;
      std::atomic_ref(*slot.posted).store(++step, std::memory_order_release);
      REQUIRE(becomes(slot.done, step));
      while (!share.idle()) std::this_thread::yield();
      const int64_t group = group_size(encoding);
      const int missed = layer.missed(experts);
      REQUIRE(missed > 0);
      const int64_t devices = kernels::zero_copy_groups(static_cast<int>(missed * kWidth / group), device_share) * group;
      CAPTURE(device_share);
      CHECK(*slot.ending == step);
      std::vector<float> result;
      for (int i = 0; i < kHidden; ++i) {
        CHECK(slot.result[i].step == step);
        result.push_back(slot.result[i].value);
      }
      if (devices == missed * kWidth) {
        CHECK(result == std::vector<float>(kHidden, 0.0f));
      } else {
        // A hidden value between two levels may be rounded otherwise; a group of columns would be 1e-1.
        CHECK(slice_reference::relative_l2(result.data(), layer.missed_sum(x, experts, weights, devices)) <
              2e-3);
      }
    }
    share.stop();
    CHECK(share.counters().bytes > 0);
  }
}

TEST_CASE("a mailbox in which x has other groups, or another size, is refused") {
  Layer layer(SliceEncoding::int8, 6);
  std::atomic<unsigned> shares_of_device[kStepsAtOnce] = {};
  alignas(128) static std::byte memory[16384];
  CpuShare share(layer.grid, SliceEncoding::int8, kHidden, kWidth, WeightOn::output, two_threads());
  for (const MissMailboxShape& shape :
       {MissMailboxShape{1, 1, kHidden, 1, 64}, {1, 1, kHidden / 5, 1, 128}}) {
    const MissMailbox mailbox(memory, shape);
    CHECK_THROWS_AS(share.start({mailbox, &layer.places, shares_of_device, {}}, 1), DeviceError);
  }
}

TEST_CASE("a worker that meets nonsense ends polling with an error that names the place") {
  Layer layer(SliceEncoding::int8, 5);
  std::atomic<unsigned> shares_of_device[kStepsAtOnce] = {};
  const MissMailboxShape shape{1, 1, kHidden, 1, 128};
  alignas(128) static std::byte memory[16384];
  const MissMailbox mailbox(memory, shape);
  CpuShare share(layer.grid, SliceEncoding::int8, kHidden, kWidth, WeightOn::output, two_threads());
  share.start({mailbox, &layer.places, shares_of_device, {}}, 1);
  const MissSlot slot = mailbox.slot(0);
  *slot.tokens = 1;
  *slot.experts = kExperts;
  std::atomic_ref(*slot.posted).store(1u, std::memory_order_release);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const std::string message = test::message_of<DeviceError>([&] { share.stop(); });
  CHECK(message.find("at step 1, layer 0: the GPU posted expert 3 of 3") != std::string::npos);
  CHECK(*slot.done == 0);
}

TEST_CASE("the device's share settles where both sides are late equally often") {
  ShareControl share(0.25, true);
  // The CPU ends first as long as the device has more than 40 %.
  for (int step = 0; step < 200; ++step) {
    share.step_ended(share.device_share() < 0.4 * ShareControl::kWhole ? 48 : 0, 48);
  }
  CHECK(share.device_share() / static_cast<double>(ShareControl::kWhole) == doctest::Approx(0.4).epsilon(0.06));
  ShareControl fixed(0.25, false);
  fixed.step_ended(48, 48);
  CHECK(fixed.device_share() == ShareControl::kWhole / 4);
}

}  // namespace lighter::offload
