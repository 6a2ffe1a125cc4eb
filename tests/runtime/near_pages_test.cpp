#include "runtime/device/near_pages.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <random>

#include "runtime/device/host_memory.h"
#include "runtime/error.h"

namespace lighter {
namespace {

const Progress kQuiet = [](const std::string&, uint64_t, uint64_t) {};
constexpr uint64_t kPages = kHugePage;

struct Unmapped {
  HostParts parts;
  ~Unmapped() { unmap_host_memory(parts.data, parts.mapped_bytes); }
};

// Times of pages of which each is near as `near` says in the order in which they are tried, and says so
// itself.
PageTimes told_by(const std::function<bool(size_t tried)>& near, size_t& tried) {
  return [&tried, near](const std::byte* pages, size_t count) {
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
      map_near_pages_last(bytes, budget, kQuiet, told_by([&](size_t i) { return near[i]; }, tried))};
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

TEST_CASE("other pages are tried until a quarter is far, within the budget, which has them back") {
  const std::vector<uint64_t> bytes = {16 * kPages, 16 * kPages};
  const auto third = [](size_t i) { return i % 3 == 0; };
  for (const uint64_t room : {0, 5, 1000}) {
    CAPTURE(room);
    MemoryBudget budget("host", (32 + room) * kPages);
    budget.take(32 * kPages, "parts");
    size_t tried = 0;
    {
      const Unmapped mapped{map_near_pages_last(bytes, budget, kQuiet, told_by(third, tried))};
      size_t near = 0;
      for (size_t i = 0; i < 32; ++i) near += is_near(mapped.parts.data + i * kHugePage);
      CHECK(near == (tried + 2) / 3);
      CHECK(near <= 26);
      if (room == 1000) CHECK(near >= 24);
    }
    CHECK(tried <= 32 + room);
    CHECK(budget.used_bytes() == 32 * kPages);
    CHECK(budget.peak_bytes() == tried * kPages);
  }
}

TEST_CASE("parts need not be whole huge pages: all of their memory is there") {
  MemoryBudget budget("host", 0);
  const std::vector<uint64_t> bytes = {3 * kPages + 5000, 7, kPages + 123, 4096};
  size_t tried = 0;
  const Unmapped mapped{
      map_near_pages_last(bytes, budget, kQuiet, told_by([](size_t i) { return i == 1; }, tried))};
  CHECK(tried == 4);
  for (size_t part = 0; part < bytes.size(); ++part) {
    CHECK(reinterpret_cast<uintptr_t>(mapped.parts.part(part)) % 4096 == 0);
    CHECK(mapped.parts.mapped_bytes_of(part) >= bytes[part]);
    std::memset(mapped.parts.part(part), 9, bytes[part]);
  }
}

TEST_CASE("whoever ends the preparing of host memory leaves nothing in the budget") {
  MemoryBudget budget("host", 100 * kPages);
  const std::vector<uint64_t> bytes = {8 * kPages};
  const Progress interrupted = [](const std::string&, uint64_t, uint64_t) { throw Interrupted(); };
  CHECK_THROWS_AS(take_host_parts(bytes, budget, "parts", true, interrupted), Interrupted);
  size_t tried = 0;
  CHECK_THROWS_AS(
      map_near_pages_last(bytes, budget, interrupted, told_by([](size_t) { return true; }, tried)),
      Interrupted);
  CHECK(budget.used_bytes() == 0);
}

TEST_CASE("each page's time is that of reading it") {
  constexpr size_t count = 40;
  const Unmapped mapped{map_host_parts(std::vector<uint64_t>{count * kPages}, kQuiet)};
  const std::vector<float> times = huge_page_times(mapped.parts.data, count);
  CHECK(times.size() == count);
  for (const float time : times) {
    CHECK(time > 1e-6f);  // 2 TB/s
    CHECK(time < 1.0f);
  }
}

}  // namespace lighter
