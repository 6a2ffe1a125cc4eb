#include "runtime/device/near_pages.h"

#include <doctest/doctest.h>
#include <sys/resource.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <random>
#include <string>

#include "runtime/device/host_memory.h"
#include "runtime/error.h"

namespace lighter {
namespace {

constexpr uint64_t kPages = kHugePage;

struct Unmapped {
  HostParts parts;
  ~Unmapped() { unmap_host_memory(parts.data, parts.mapped_bytes); }
};

// Times of pages of which each is near as `near` says in the order in which they are tried, and says so
// itself.
PageTimes told_by(const std::function<bool(size_t tried)>& near, size_t& tried) {
  return [&tried, near](const std::byte* pages, size_t count, const Progress&) {
    std::vector<float> times;
    for (size_t i = 0; i < count; ++i, ++tried) {
      times.push_back(near(tried) ? 1.0f : 2.0f);
      std::memset(const_cast<std::byte*>(pages) + i * kHugePage, near(tried) ? 1 : 2, kHugePage);
    }
    return times;
  };
}

bool is_near(const std::byte* page) {
  return std::all_of(page, page + kHugePage, [](std::byte value) { return value == std::byte{1}; });
}

size_t near_of(const HostParts& parts, size_t pages) {
  size_t near = 0;
  for (size_t i = 0; i < pages; ++i) near += is_near(parts.data + i * kHugePage);
  return near;
}

uint64_t address_space_bytes() {
  uint64_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  return pages * 4096;
}

}  // namespace

TEST_CASE("pages are near or far where their times form two groups, and near where they form one") {
  std::minstd_rand random(std::random_device{}());
  std::normal_distribution<float> fast(150, 15), slow(280, 40);
  std::vector<float> times;
  std::vector<bool> expected;
  for (int i = 0; i < 1000; ++i) {
    expected.push_back(random() % 3 != 0);
    times.push_back(expected.back() ? std::min(fast(random), 200.0f) : std::max(slow(random), 240.0f));
  }
  CHECK(near_ones(times) == expected);
  times[random() % 1000] = 1e9f;  // a page that somebody kept from being read
  CHECK(std::ranges::count(near_ones(times), true) >= std::ranges::count(expected, true) - 1);

  for (float& time : times) time = fast(random);
  CHECK(std::ranges::count(near_ones(times), false) == 0);
  CHECK(near_ones(std::vector<float>(3, 1.0f)) == std::vector<bool>(3, true));
  CHECK(near_ones({}).empty());
}

TEST_CASE("each part ends in near pages, the same portion of each, and no page is lost") {
  MemoryBudget budget("host", 0);
  std::minstd_rand random(std::random_device{}());
  std::vector<bool> near(42);
  for (size_t i = 0; i < near.size(); ++i) near[i] = i % 2 == 0;
  std::shuffle(near.begin(), near.end(), random);
  size_t tried = 0;
  const std::vector<uint64_t> bytes = {20 * kPages, 10 * kPages, 0, 12 * kPages};
  const Unmapped mapped{
      map_near_pages_last(bytes, budget, kNoProgress, told_by([&](size_t i) { return near[i]; }, tried))};
  CHECK(tried == 42);
  for (const size_t part : {0, 1, 3}) {
    const size_t pages = bytes[part] / kPages;
    CHECK(mapped.parts.mapped_bytes_of(part) == bytes[part]);
    for (size_t i = 0; i < pages; ++i) {
      CAPTURE(part);
      CAPTURE(i);
      CHECK(is_near(mapped.parts.part(part) + i * kHugePage) == (i >= pages / 2));
    }
  }
}

TEST_CASE("others are tried until no more than a quarter is far, as far as the budget has room for them") {
  if (available_memory_bytes() < (uint64_t{5} << 30)) {
    MESSAGE("less than 5 GiB are free: no others would be tried, and that is not tested here");
    return;
  }
  const std::vector<uint64_t> bytes = {16 * kPages, 16 * kPages};
  const auto third = [](size_t i) { return i % 3 == 0; };
  const size_t tried_with_room[][2] = {{0, 32}, {31, 32}, {40, 64}, {1000, 96}};
  for (const auto& [room, expected] : tried_with_room) {
    CAPTURE(room);
    MemoryBudget budget("host", (32 + room) * kPages);
    budget.take(32 * kPages, "parts");
    size_t tried = 0;
    {
      const Unmapped mapped{map_near_pages_last(bytes, budget, kNoProgress, told_by(third, tried))};
      CHECK(tried == expected);
      CHECK(near_of(mapped.parts, 32) == std::min<size_t>(32, (tried + 2) / 3));
    }
    budget.take(room * kPages, "all that was spare");
  }
}

TEST_CASE("parts need not be whole huge pages: all of their memory is there") {
  MemoryBudget budget("host", 0);
  const std::vector<uint64_t> bytes = {3 * kPages + 5000, 7, kPages + 123, 4096};
  size_t tried = 0;
  const Unmapped mapped{
      map_near_pages_last(bytes, budget, kNoProgress, told_by([](size_t i) { return i == 1; }, tried))};
  CHECK(tried == 4);
  for (size_t part = 0; part < bytes.size(); ++part) {
    CHECK(reinterpret_cast<uintptr_t>(mapped.parts.part(part)) % 4096 == 0);
    CHECK(mapped.parts.mapped_bytes_of(part) >= bytes[part]);
    std::memset(mapped.parts.part(part), 9, bytes[part]);
  }
  const Unmapped small{
      map_near_pages_last(std::vector<uint64_t>{0, 5000}, budget, kNoProgress, told_by({}, tried))};
  std::memset(small.parts.part(1), 9, 5000);
  CHECK(tried == 4);
}

// Sanitizers map memory of their own all the time.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
TEST_CASE("pages that the system will not move stay as they are, and all memory is there") {
  MemoryBudget budget("host", 0);
  rlimit usual{};
  REQUIRE(getrlimit(RLIMIT_AS, &usual) == 0);
  const std::vector<uint64_t> bytes = {64 * kPages, 5000};
  const PageTimes times = [&](const std::byte*, size_t count, const Progress&) {
    std::vector<float> every_other(count);
    for (size_t i = 0; i < count; ++i) every_other[i] = static_cast<float>(1 + i % 2);
    rlimit full = usual;
    full.rlim_cur = address_space_bytes() - kHugePage / 2;
    REQUIRE(setrlimit(RLIMIT_AS, &full) == 0);
    return every_other;
  };
  const Unmapped mapped{map_near_pages_last(bytes, budget, kNoProgress, times)};
  REQUIRE(setrlimit(RLIMIT_AS, &usual) == 0);
  std::memset(mapped.parts.part(0), 9, bytes[0]);
  std::memset(mapped.parts.part(1), 9, bytes[1]);
}
#endif

TEST_CASE("whoever ends the preparing of host memory leaves nothing in the budget") {
  const std::vector<uint64_t> bytes = {32 * kPages};
  size_t told = 0;
  for (size_t last = 1; last < 6; ++last) {
    MemoryBudget budget("host", 100 * kPages);
    size_t tried = 0;
    told = 0;
    const Progress interrupt = [&](const std::string&, uint64_t, uint64_t) {
      if (++told == last) throw Interrupted();
    };
    const PageTimes far_ones = [&](const std::byte* pages, size_t count, const Progress& progress) {
      progress("timing", 0, 0);
      return told_by([](size_t i) { return i == 0; }, tried)(pages, count, kNoProgress);
    };
    CHECK_THROWS_AS(map_near_pages_last(bytes, budget, interrupt, far_ones), Interrupted);
    CHECK_THROWS_AS(take_host_parts(bytes, budget, "parts", true, [](auto&&...) { throw Interrupted(); }),
                    Interrupted);
    budget.take(100 * kPages, "everything");
    if (available_memory_bytes() < (uint64_t{5} << 30)) break;  // no others are tried
  }
}

TEST_CASE("each page's time is that of reading it") {
  constexpr size_t count = 40;
  const Unmapped mapped{map_host_parts(std::vector<uint64_t>{count * kPages}, kNoProgress)};
  const std::vector<float> times = huge_page_times(mapped.parts.data, count, kNoProgress);
  CHECK(times.size() == count);
  for (const float time : times) {
    CHECK(time > 1e-6f);  // 2 TB/s
    CHECK(time < 1.0f);
  }
}

}  // namespace lighter
