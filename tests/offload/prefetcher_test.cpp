#include "offload/prefetcher.h"

#include <doctest/doctest.h>
#include <tbb/global_control.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "runtime/error.h"

namespace lighter::offload {
namespace {

constexpr ExpertGrid kGrid{8, 16, 4, 64};

// Ends copies when the test says so, from a thread that is none of oneTBB's.
class Copies {
 public:
  StartPrefetch starter() {
    return [this](uint64_t step, SliceId slice, std::function<void()> ended) {
      std::lock_guard lock(mutex_);
      started_.push_back({step, slice});
      under_way_.push_back(std::move(ended));
      most_ = std::max(most_, under_way_.size());
      changed_.notify_all();
      return true;
    };
  }
  bool wait_for_started(size_t count) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(10), [&] { return started_.size() >= count; });
  }
  size_t end_all() {
    std::vector<std::function<void()>> ended;
    {
      std::lock_guard lock(mutex_);
      ended.swap(under_way_);
    }
    for (const auto& call : ended) call();
    return ended.size();
  }
  size_t most() {
    std::lock_guard lock(mutex_);
    return most_;
  }
  std::vector<std::pair<uint64_t, SliceId>> started() {
    std::lock_guard lock(mutex_);
    return started_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::pair<uint64_t, SliceId>> started_;
  std::vector<std::function<void()>> under_way_;
  size_t most_ = 0;
};

}  // namespace

TEST_CASE("a guess becomes one copy for each slice of its experts, in order, with its step") {
  Copies copies;
  Prefetcher prefetcher(kGrid, 100, copies.starter());
  prefetcher.request(7, 3, {2, 5});
  REQUIRE(copies.wait_for_started(8));
  copies.end_all();
  prefetcher.drain();
  const auto started = copies.started();
  REQUIRE(started.size() == 8);
  for (int i = 0; i < 8; ++i) {
    CHECK(started[i].first == 7);
    CHECK(started[i].second == SliceId{3, i < 4 ? 2 : 5, i % 4});
  }
}

TEST_CASE("no more copies are under way than allowed, and each end lets another begin") {
  for (const int bound : {1, 3, 64}) {
    Copies copies;
    Prefetcher prefetcher(kGrid, bound, copies.starter());
    for (int layer = 0; layer < kGrid.layers; ++layer) prefetcher.request(1, layer, {0, 3, 7, 9, 15});
    const size_t all = kGrid.layers * 5 * kGrid.slices;
    size_t ended = 0;
    while (ended < all) {
      REQUIRE(copies.wait_for_started(std::min(all, ended + bound)));
      ended += copies.end_all();
    }
    prefetcher.drain();
    CHECK(copies.started().size() == all);
    CHECK(copies.most() == static_cast<size_t>(bound));
  }
}

TEST_CASE("drain waits for the last copy") {
  Copies copies;
  Prefetcher prefetcher(kGrid, 2, copies.starter());
  prefetcher.request(1, 0, {0, 1});
  REQUIRE(copies.wait_for_started(2));
  size_t ended = 0;
  std::thread ending([&] {
    while (ended < 8) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      ended += copies.end_all();
    }
  });
  prefetcher.drain();
  CHECK(copies.started().size() == 8);
  ending.join();
  CHECK(ended == 8);
}

TEST_CASE("guesses for which nothing is to be copied do not use up the bound") {
  int asked = 0;
  Prefetcher prefetcher(kGrid, 2, [&](uint64_t, SliceId, std::function<void()>) {
    ++asked;
    return false;
  });
  for (int i = 0; i < 100; ++i) prefetcher.request(i, 0, {0, 1, 2});
  prefetcher.drain();
  CHECK(asked == 100 * 3 * 4);
}

TEST_CASE("copies may end before they are known to have started") {
  Prefetcher prefetcher(kGrid, 3, [&](uint64_t, SliceId, const std::function<void()>& ended) {
    ended();
    return true;
  });
  for (int i = 0; i < 100; ++i) prefetcher.request(i, 0, {0, 1, 2});
  prefetcher.drain();
}

TEST_CASE("guesses may come from several threads") {
  std::mutex mutex;
  size_t started = 0;
  Prefetcher prefetcher(kGrid, 5, [&](uint64_t, SliceId, const std::function<void()>& ended) {
    {
      std::lock_guard lock(mutex);
      ++started;
    }
    ended();
    return true;
  });
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 50; ++i) prefetcher.request(i, 0, {1});
    });
  }
  for (auto& thread : threads) thread.join();
  prefetcher.drain();
  CHECK(started == 3 * 50 * 4);
}

TEST_CASE("what a worker throws is thrown by drain, and does not keep the prefetcher from ending") {
  Prefetcher prefetcher(kGrid, 4, [](uint64_t, SliceId slice, const std::function<void()>&) -> bool {
    if (slice.expert == 1) throw DeviceError("no such expert");
    return false;
  });
  prefetcher.request(1, 0, {0, 1, 2});
  CHECK_THROWS_AS(prefetcher.drain(), DeviceError);
}

TEST_CASE("a single thread for oneTBB is enough for prefetches to start by themselves") {
  const tbb::global_control one(tbb::global_control::max_allowed_parallelism, 1);
  Copies copies;
  Prefetcher prefetcher(kGrid, 2, copies.starter());
  prefetcher.request(1, 0, {0});
  CHECK(copies.wait_for_started(2));
  copies.end_all();
  CHECK(copies.wait_for_started(4));
  copies.end_all();
  prefetcher.drain();
}

}  // namespace lighter::offload
