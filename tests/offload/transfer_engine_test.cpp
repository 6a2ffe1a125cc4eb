#include "offload/transfer_engine.h"

#include <doctest/doctest.h>

#include <atomic>
#include <numeric>
#include <thread>

#include "runtime/error.h"
#include "tests/offload/manual_device.h"

namespace lighter::offload {
namespace {

constexpr size_t kPiece = 64;
constexpr size_t kBytes = 4 * kPiece;
constexpr int kDemand = 0;  // the stream numbers, in the order in which the engine makes them
constexpr int kPrefetch = 1;

// A slot of device memory and the slice that goes there.
struct Target {
  explicit Target(Device& device, uint8_t first) : from(kBytes), to(kBytes), ready(device.new_event()) {
    for (size_t i = 0; i < kBytes; ++i) from[i] = static_cast<std::byte>(first + i % 97);
  }
  CopyRequest request(const Event* last_use = nullptr) {
    return {to.data(), from.data(), kBytes, last_use, ready.get()};
  }
  bool arrived() const { return ready->passed() && to == from; }

  std::vector<std::byte> from;
  std::vector<std::byte> to;
  std::unique_ptr<Event> ready;
};

template <typename Condition>
bool eventually(Condition condition) {
  for (int i = 0; i < 10000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return false;
}

// Long enough for the engine's thread to do what it must not do.
void give_it_time() {
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
}

struct Ended {
  std::atomic<int> count{0};
  std::function<void()> callback() {
    return [this] { ++count; };
  }
};

}  // namespace

TEST_CASE("a demand copy is asked for at once and ready when it has passed") {
  ManualDevice device;
  Target target(device, 1);
  TransferEngine engine(device, kPiece);
  engine.fetch(target.request());
  REQUIRE(device.asked().size() == 1);
  CHECK(device.asked()[0].stream == kDemand);
  CHECK(device.asked()[0].bytes == kBytes);
  CHECK_FALSE(target.ready->passed());
  device.allow(kDemand);
  CHECK(target.arrived());
  CHECK(engine.counters().demand_bytes == kBytes);
  CHECK(engine.counters().demand_busy_bytes == kBytes);
  CHECK(engine.counters().demand_busy_s == 0.001);
  CHECK(engine.counters().prefetch_bytes == 0);
}

TEST_CASE("a copy waits for the last use of its destination and for an earlier filling of it") {
  ManualDevice device;
  Target target(device, 1);
  const auto last_use = device.new_event();
  TransferEngine engine(device, kPiece);
  const auto reader = device.new_copy_stream();
  constexpr int kReader = 2;
  std::byte read{};
  reader->copy(&read, target.to.data(), 1);
  reader->record(*last_use);
  engine.fetch(target.request(last_use.get()));
  device.allow(kDemand, 2);
  CHECK(device.done().empty());
  device.allow(kReader);
  CHECK(target.arrived());
  reader->copy(target.to.data(), &read, 1);
  reader->record(*target.ready);
  engine.fetch(target.request());
  CHECK(device.done().size() == 2);
  device.allow(kReader);
  CHECK(device.done().size() == 4);
  CHECK(target.arrived());
}

TEST_CASE("a prefetch is copied piece by piece, one piece outstanding") {
  ManualDevice device;
  Target target(device, 1);
  Ended ended;
  TransferEngine engine(device, kPiece);
  engine.prefetch(target.request(), ended.callback());
  for (size_t piece = 1; piece <= 4; ++piece) {
    REQUIRE(device.wait_for_asked(piece));
    give_it_time();
    CHECK(device.asked().size() == piece);
    CHECK(device.asked().back().bytes == kPiece);
    CHECK(device.asked().back().to == target.to.data() + (piece - 1) * kPiece);
    CHECK(ended.count == 0);
    device.allow(kPrefetch);
  }
  REQUIRE(eventually([&] { return ended.count == 1; }));
  CHECK(target.arrived());
  CHECK(engine.counters().prefetch_bytes == kBytes);
  CHECK(engine.counters().demand_bytes == 0);
}

TEST_CASE("a demand overtakes a prefetch: at most one piece goes first") {
  ManualDevice device;
  Target guess(device, 1);
  Target needed(device, 50);
  Ended ended;
  TransferEngine engine(device, kPiece);
  engine.prefetch(guess.request(), ended.callback());
  REQUIRE(device.wait_for_asked(1));
  engine.fetch(needed.request());
  device.allow(kPrefetch);
  give_it_time();
  CHECK(device.asked().size() == 2);  // no second piece while the demand is outstanding
  device.allow(kDemand);
  CHECK(needed.arrived());
  REQUIRE(device.wait_for_asked(3));
  device.let_go();
  REQUIRE(eventually([&] { return ended.count == 1; }));
  CHECK(guess.arrived());
  const auto done = device.done();
  REQUIRE(done.size() == 5);
  CHECK(done[0].stream == kPrefetch);
  CHECK(done[1].stream == kDemand);
  for (int i = 2; i < 5; ++i) CHECK(done[i].stream == kPrefetch);
}

TEST_CASE("a prefetch that was asked for during a demand does not begin before it has passed") {
  ManualDevice device;
  Target guess(device, 1);
  Target needed(device, 50);
  Ended ended;
  TransferEngine engine(device, kPiece);
  engine.fetch(needed.request());
  engine.prefetch(guess.request(), ended.callback());
  give_it_time();
  CHECK(device.asked().size() == 1);
  device.let_go();
  REQUIRE(eventually([&] { return ended.count == 1; }));
  CHECK(guess.arrived());
}

TEST_CASE("expediting a prefetch makes its rest a demand, and ready covers both parts") {
  for (const int pieces_first : {1, 2, 4}) {
    ManualDevice device;
    Target guess(device, 1);
    Ended ended;
    TransferEngine engine(device, kPiece);
    const auto copy = engine.prefetch(guess.request(), ended.callback());
    for (int piece = 1; piece < pieces_first; ++piece) {
      REQUIRE(device.wait_for_asked(piece));
      device.allow(kPrefetch);
    }
    REQUIRE(device.wait_for_asked(pieces_first));
    engine.expedite(*copy);
    device.allow(kDemand);
    CHECK_FALSE(guess.ready->passed());  // the last piece is still outstanding
    device.allow(kPrefetch);
    CHECK(guess.arrived());
    REQUIRE(eventually([&] { return ended.count == 1; }));
    CHECK(engine.counters().prefetch_bytes == pieces_first * kPiece);
    CHECK(engine.counters().demand_bytes == kBytes - pieces_first * kPiece);
    give_it_time();
    CHECK(device.asked().size() == static_cast<size_t>(pieces_first) + (pieces_first < 4));
  }
}

TEST_CASE("expediting a prefetch that has not begun makes all of it a demand") {
  ManualDevice device;
  Target first(device, 1);
  Target second(device, 50);
  Ended ended;
  TransferEngine engine(device, kPiece);
  engine.prefetch(first.request(), ended.callback());
  const auto copy = engine.prefetch(second.request(), ended.callback());
  REQUIRE(device.wait_for_asked(1));
  engine.expedite(*copy);
  device.allow(kDemand);
  CHECK(second.arrived());
  CHECK(engine.counters().demand_bytes == kBytes);
  device.let_go();
  REQUIRE(eventually([&] { return ended.count == 2; }));
  CHECK(first.arrived());
  CHECK(engine.counters().prefetch_bytes == kBytes);
}

TEST_CASE("cancelling a prefetch stops it and says what was copied in vain") {
  ManualDevice device;
  Target begun(device, 1);
  Target waiting(device, 50);
  Target next(device, 90);
  Ended ended;
  TransferEngine engine(device, kPiece);
  const auto copy = engine.prefetch(begun.request(), ended.callback());
  const auto later = engine.prefetch(waiting.request(), ended.callback());
  REQUIRE(device.wait_for_asked(1));
  CHECK(engine.cancel(*copy) == kPiece);
  CHECK(engine.cancel(*later) == 0);
  // The slot's next filling must come after the piece that was under way.
  CopyRequest again = next.request();
  again.to = begun.to.data();
  again.ready = begun.ready.get();
  engine.fetch(again);
  device.allow(kDemand);
  CHECK(device.done().empty());
  device.let_go();
  CHECK(begun.to == next.from);
  REQUIRE(eventually([&] { return ended.count == 2; }));
  CHECK(engine.counters().prefetch_bytes == kPiece);
}

TEST_CASE("the destructor ends everything that was asked for, once each") {
  for (const bool let_go : {false, true}) {
    ManualDevice device;
    std::vector<Target> targets;
    for (uint8_t i = 0; i < 50; ++i) targets.emplace_back(device, i);
    std::vector<Ended> ended(targets.size());
    std::thread release;
    {
      TransferEngine engine(device, kPiece);
      if (let_go) device.let_go();
      for (size_t i = 0; i < targets.size(); ++i) engine.prefetch(targets[i].request(), ended[i].callback());
      if (!let_go) {
        CHECK(device.wait_for_asked(1));
        release = std::thread([&] {
          give_it_time();
          device.let_go();
        });
      }
    }
    if (release.joinable()) release.join();
    for (const Ended& each : ended) CHECK(each.count == 1);
    for (const Target& target : targets) CHECK(target.ready->passed());
  }
}

TEST_CASE("what the prefetch thread meets is thrown by rethrow, and demands still work") {
  ManualDevice device;
  Target guess(device, 1);
  Target second(device, 20);
  Target needed(device, 50);
  Ended ended;
  TransferEngine engine(device, kPiece);
  device.let_go();
  device.fail(kPrefetch, 2);
  CHECK_NOTHROW(engine.rethrow());
  const auto copy = engine.prefetch(guess.request(), ended.callback());
  REQUIRE(eventually([&] { return ended.count == 1; }));
  CHECK_THROWS_AS(engine.rethrow(), DeviceError);
  CHECK_THROWS_AS(engine.rethrow(), DeviceError);
  engine.prefetch(second.request(), ended.callback());
  REQUIRE(eventually([&] { return ended.count == 2; }));
  CHECK(engine.counters().prefetch_bytes == 2 * kPiece);
  engine.fetch(needed.request());
  CHECK(needed.arrived());
  engine.expedite(*copy);  // what did not come as a prefetch comes as a demand
  CHECK(guess.arrived());
}

TEST_CASE("copies without a gap between them are one busy time") {
  ManualDevice device;
  Target a(device, 1);
  Target b(device, 50);
  TransferEngine engine(device, kPiece);
  engine.fetch(a.request());
  engine.fetch(b.request());
  CHECK(engine.counters().demand_busy_bytes == 0);  // still outstanding
  device.allow(kDemand, 2);
  CHECK(engine.counters().demand_busy_bytes == 2 * kBytes);
  CHECK(engine.counters().demand_busy_s == 0.001);
  engine.fetch(a.request());
  device.allow(kDemand);
  CHECK(engine.counters().demand_busy_bytes == 3 * kBytes);
  CHECK(engine.counters().demand_busy_s == 0.002);
}

}  // namespace lighter::offload
