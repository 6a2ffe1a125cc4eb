#include "offload/miss_fetcher.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "runtime/error.h"
#include "runtime/kernels/decode.h"
#include "tests/message_of.h"

namespace lighter::offload {
namespace {

constexpr ExpertGrid kGrid{2, 3, 4, 4096};

// What a GPU does in a step with two MoE layers: posts experts and waits for what they miss.
struct Rig {
  Rig()
      : slots(device->allocate(kGrid.slices * 2 * kGrid.slice_bytes, "slots")),
        words(device->allocate(4096, "words")),
        tags(device->allocate_host(4096, "tags")),
        mailbox(memory, shape) {
    REQUIRE(MissMailbox::bytes(shape) <= sizeof(memory));
    std::memset(words.data(), 0, words.bytes());
    host.resize(kGrid.total_slices() * kGrid.slice_bytes);
    for (size_t i = 0; i < host.size(); ++i)
      host[i] = static_cast<std::byte>(i / kGrid.slice_bytes * 7 + i % 251);
    places.version = 1;
    for (size_t i = 0; i < kGrid.total_slices(); ++i) {
      places.host.push_back(host.data() + i * kGrid.slice_bytes);
      places.device.push_back(i % 4 < 2 ? places.host.back() : nullptr);  // of each expert two of four
    }
  }

  MissWork work() {
    return {mailbox, &places, nullptr, {slots.data(), arrived(), reinterpret_cast<uint32_t*>(tags.data())}};
  }
  uint32_t* arrived() { return reinterpret_cast<uint32_t*>(words.data()); }
  void post(int layer, uint32_t step, int first, int second) {
    const MissSlot slot = mailbox.slot(layer);
    *slot.tokens = 1;
    slot.experts[0] = first;
    slot.experts[1] = second;
    std::atomic_ref(*slot.posted).store(step, std::memory_order_release);
  }
  bool arrives(int entry, int layer, uint32_t step) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (std::atomic_ref(arrived()[entry]).load(std::memory_order_acquire) !=
           kernels::arrival_tag(step, layer, kGrid.layers)) {
      if (std::chrono::steady_clock::now() > deadline) return false;
      std::this_thread::yield();
    }
    return true;
  }
  bool holds(int entry, const SliceId& slice) {
    return std::memcmp(slots.data() + entry * kGrid.slice_bytes, places.host[kGrid.index(slice)],
                       kGrid.slice_bytes) == 0;
  }

  const MissMailboxShape shape{kGrid.layers, 1, 16, 2};
  alignas(128) std::byte memory[4096];
  const std::unique_ptr<Device> device = make_cpu_device(1 << 20, 1 << 20);
  Buffer slots, words, tags;
  std::vector<std::byte> host;
  SlicePlaces places;
  MissMailbox mailbox;
};

}  // namespace

TEST_CASE(
    "a posted layer's missed slices come to the slots in the order of their sum, each before its word") {
  Rig rig;
  MissFetcher fetcher(*rig.device, kGrid, 2);
  uint32_t step = 7;
  for (int time = 0; time < 2; ++time) {  // stopped and started again, as between requests
    fetcher.start(rig.work(), step);
    for (const uint32_t last = step + 20; step < last; ++step) {
      for (int layer = 0; layer < kGrid.layers; ++layer) {
        const int first = static_cast<int>(step % 3), second = (first + 1 + layer) % 3;
        rig.post(layer, step, first, second);
        const int lower = std::min(first, second), higher = std::max(first, second);
        int entry = 0;
        for (const int expert : {lower, higher}) {
          for (const int slice : {2, 3}) {
            REQUIRE(rig.arrives(entry, layer, step));
            CHECK(rig.holds(entry++, {layer, expert, slice}));
          }
        }
        // Before that the post is still looked into.
        while (rig.mailbox.done(layer) != step) std::this_thread::yield();
      }
    }
    fetcher.stop();
  }
}

TEST_CASE("a fetcher that meets nonsense stops with an error that names the place") {
  Rig rig;
  MissFetcher fetcher(*rig.device, kGrid, 2);
  fetcher.start(rig.work(), 1);
  rig.post(0, 1, 0, kGrid.experts);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  CHECK(test::message_of<DeviceError>([&] { fetcher.stop(); }) ==
        "at step 1, layer 0: the GPU posted expert 3 of 3");
  fetcher.stop();  // nothing is left of it
}

}  // namespace lighter::offload
