#include "runtime/device/near_pages.h"

#include <spdlog/spdlog.h>
#include <sys/mman.h>
#include <tbb/parallel_for.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <fstream>
#include <memory>
#include <numeric>
#include <random>

#include "runtime/bytes.h"
#include "runtime/device/host_memory.h"
#include "runtime/device/host_reading.h"
#include "runtime/error.h"

namespace lighter {
namespace {

constexpr uint64_t kPage = 4096;
constexpr double kTellingRatio = 1.25;
constexpr int kTimes = 3;
constexpr uint64_t kTouchedAtOnce = uint64_t{1} << 30;
constexpr uint64_t kWorthSorting = uint64_t{1} << 30;
constexpr uint64_t kLeftToOthers = uint64_t{4} << 30;  // of the machine's memory, while others are tried

class Mapping {
 public:
  explicit Mapping(uint64_t bytes) : data_(static_cast<std::byte*>(map_host_memory(bytes))), bytes_(bytes) {}
  ~Mapping() {
    if (data_ != nullptr) unmap_host_memory(data_, bytes_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  std::byte* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }
  std::byte* release() { return std::exchange(data_, nullptr); }

  void touch(uint64_t from, uint64_t to, const std::function<void(uint64_t bytes)>& done) const {
    for (uint64_t at = from; at < to; at += kTouchedAtOnce) {
      touch_host_memory(data_ + at, std::min(kTouchedAtOnce, to - at));
      done(std::min(at + kTouchedAtOnce, to));
    }
  }

 private:
  std::byte* data_;
  uint64_t bytes_;
};

HostParts layout_of(std::span<const uint64_t> bytes) {
  HostParts parts;
  for (const uint64_t each : bytes) {
    parts.begins.push_back(parts.mapped_bytes);
    parts.mapped_bytes += (each + kPage - 1) / kPage * kPage;
  }
  return parts;
}

// Which of a mapping's `count` pages should be near, if so many can be.
std::vector<bool> most_wanted(const HostParts& parts, size_t count, size_t near) {
  std::vector<double> place(count);  // in the part, from 0 to 1
  size_t part = 0;
  for (size_t i = 0; i < count; ++i) {
    const uint64_t middle = i * kHugePage + kHugePage / 2;
    while (part + 1 < parts.begins.size() && parts.begins[part + 1] <= middle) ++part;
    place[i] =
        static_cast<double>(middle - parts.begins[part]) / static_cast<double>(parts.mapped_bytes_of(part));
  }
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  std::ranges::nth_element(order, order.begin() + static_cast<std::ptrdiff_t>(near),
                           [&](size_t a, size_t b) { return place[a] > place[b]; });
  std::vector<bool> wanted(count);
  for (size_t i = 0; i < near; ++i) wanted[order[i]] = true;
  return wanted;
}

// Pages to choose from, in mappings of their own.
class Candidates {
 public:
  explicit Candidates(const PageTimes& times) : measure_(times) {}

  void add(size_t pages, const std::function<void(uint64_t bytes)>& touched) {
    mappings_.push_back(std::make_unique<Mapping>(pages * kHugePage));
    mappings_.back()->touch(0, pages * kHugePage, touched);
    const std::vector<float> times = measure_(mappings_.back()->data(), pages);
    times_.insert(times_.end(), times.begin(), times.end());
    near_ = near_ones(times_);
    near_count_ = static_cast<size_t>(std::ranges::count(near_, true));
  }

  size_t near_count() const { return near_count_; }
  // kept: how many pages stay.
  void log(size_t kept) const {
    std::vector<float> sorted = times_;
    std::ranges::sort(sorted);
    const auto rate = [&](size_t i) { return 1e-9 * kHugePage / sorted[i]; };
    const size_t count = sorted.size();
    if (near_count_ == count) {
      spdlog::info("host memory: {} that reads alike, {:.1f} to {:.1f} GB/s a thread",
                   format_bytes(kept * kHugePage), rate(count * 19 / 20), rate(count / 20));
      return;
    }
    spdlog::info(
        "host memory: {:.0f} % of {} near the processor, out of {}; {:.1f} GB/s a thread, the rest {:.1f}",
        100.0 * static_cast<double>(std::min(near_count_, kept)) / static_cast<double>(kept),
        format_bytes(kept * kHugePage), format_bytes(count * kHugePage), rate(near_count_ / 2),
        rate((near_count_ + count) / 2));
  }

  struct Move {
    std::byte* from;
    size_t to;  // page
    size_t pages;
  };
  std::vector<Move> moves(const std::vector<bool>& wanted) const {
    std::vector<Move> moves;
    size_t next[2] = {0, 0};  // far, near
    size_t last_mapping = 0;
    for (size_t to = 0; to < wanted.size(); ++to) {
      size_t& i = next[wanted[to]];
      while (near_[i] != wanted[to]) ++i;
      size_t mapping = 0, page = i++;
      while (page >= mappings_[mapping]->bytes() / kHugePage)
        page -= mappings_[mapping++]->bytes() / kHugePage;
      std::byte* const from = mappings_[mapping]->data() + page * kHugePage;
      const bool goes_on = !moves.empty() && mapping == last_mapping &&
                           moves.back().from + moves.back().pages * kHugePage == from;
      if (goes_on) {
        ++moves.back().pages;
      } else {
        moves.push_back({from, to, 1});
      }
      last_mapping = mapping;
    }
    return moves;
  }

 private:
  const PageTimes& measure_;
  std::vector<std::unique_ptr<Mapping>> mappings_;
  std::vector<float> times_;
  std::vector<bool> near_;
  size_t near_count_ = 0;
};

// What the budget holds for candidates beyond those that stay.
class Extra {
 public:
  explicit Extra(MemoryBudget& budget) : budget_(budget) {}
  ~Extra() { budget_.give_back(bytes_); }
  Extra(const Extra&) = delete;
  Extra& operator=(const Extra&) = delete;

  // Of `pages`, as many as there is room for.
  size_t take(size_t pages) {
    const uint64_t free = budget_.limit_bytes() - budget_.used_bytes();
    const uint64_t there = available_memory_bytes();
    const uint64_t room = std::min(free, there > kLeftToOthers ? there - kLeftToOthers : 0);
    const size_t taken = std::min<size_t>(pages, room / kHugePage);
    budget_.take(taken * kHugePage, "pages to choose from");
    bytes_ += taken * kHugePage;
    return taken;
  }

 private:
  MemoryBudget& budget_;
  uint64_t bytes_ = 0;
};

// Every piece that is moved is a mapping of its own to the system, of which a process may have so many.
size_t most_moves() {
  std::ifstream file("/proc/sys/vm/max_map_count");
  size_t most = 65530;
  file >> most;
  return most / 2;
}

// The pages keep what is in them; none are left where they were.
bool move_pages(const std::vector<Candidates::Move>& moves, std::byte* to) {
  for (const auto& [from, page, pages] : moves) {
    const size_t bytes = pages * kHugePage;
    if (mremap(from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, to + page * kHugePage) ==
        MAP_FAILED) {
      spdlog::warn("pages of host memory could not be moved ({}); they stay as they are",
                   std::strerror(errno));
      return false;
    }
  }
  return true;
}

}  // namespace

HostParts map_host_parts(std::span<const uint64_t> bytes, const Progress& progress) {
  HostParts parts = layout_of(bytes);
  Mapping mapping(parts.mapped_bytes);
  mapping.touch(0, parts.mapped_bytes,
                [&](uint64_t done) { progress("preparing host memory", done, parts.mapped_bytes); });
  parts.data = mapping.release();
  return parts;
}

std::vector<float> huge_page_times(const std::byte* pages, size_t count) {
  using Clock = std::chrono::steady_clock;
  std::vector<float> times(count, std::numeric_limits<float>::max());
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  std::minstd_rand random;
  std::atomic<uint64_t> sum = 0;  // used, so that the reading is not left out
  for (int i = 0; i < kTimes; ++i) {
    std::ranges::shuffle(order, random);
    tbb::parallel_for(size_t{0}, count, [&](size_t k) {
      const size_t page = order[k];
      const auto begin = Clock::now();
      sum.fetch_add(sum_of_words(pages + page * kHugePage, kHugePage), std::memory_order_relaxed);
      times[page] = std::min(times[page], std::chrono::duration<float>(Clock::now() - begin).count());
    });
  }
  return times;
}

std::vector<bool> near_ones(std::span<const float> times) {
  std::vector<float> sorted(times.begin(), times.end());
  std::ranges::sort(sorted);
  const size_t count = sorted.size();
  if (count == 0) return {};
  // A page that was interrupted three times would move the mean.
  for (float& time : sorted) time = std::min(time, 4 * sorted[count / 2]);
  const double all = std::accumulate(sorted.begin(), sorted.end(), 0.0);
  double below = 0, clearest = 0, limit = std::numeric_limits<double>::max();
  for (size_t i = 1; i < count; ++i) {  // the greatest variance between groups (Otsu)
    below += sorted[i - 1];
    const auto fast = static_cast<double>(i), slow = static_cast<double>(count - i);
    const double fast_mean = below / fast, slow_mean = (all - below) / slow;
    const double between = fast * slow * (slow_mean - fast_mean) * (slow_mean - fast_mean);
    if (between <= clearest) continue;
    clearest = between;
    limit = slow_mean >= kTellingRatio * fast_mean ? (sorted[i - 1] + sorted[i]) / 2
                                                   : std::numeric_limits<double>::max();
  }
  std::vector<bool> near(times.size());
  std::transform(times.begin(), times.end(), near.begin(), [&](float time) { return time <= limit; });
  return near;
}

HostParts map_near_pages_last(std::span<const uint64_t> bytes, MemoryBudget& budget, const Progress& progress,
                              const PageTimes& times) {
  HostParts parts = layout_of(bytes);
  const size_t pages = parts.mapped_bytes / kHugePage;
  Mapping mapping(parts.mapped_bytes);
  bool moved = false;
  {
    Extra extra(budget);
    Candidates candidates(times);
    size_t tried = 0;
    const auto try_more = [&](size_t count) {
      candidates.add(count, [&](uint64_t done) {
        const uint64_t before = tried * kHugePage;
        progress("preparing host memory", before + done,
                 std::max(parts.mapped_bytes, before + count * kHugePage));
      });
      tried += count;
    };
    try_more(pages);
    const auto enough = static_cast<size_t>(static_cast<double>(pages) * (1 - kFarShare));
    while (candidates.near_count() < enough) {
      // In portions, of which each could be all that is needed.
      const size_t more = extra.take(std::max(enough - candidates.near_count(), pages / 16 + 1));
      if (more == 0) break;
      try_more(more);
    }
    const size_t near = std::min(candidates.near_count(), pages);
    const auto moves = candidates.moves(most_wanted(parts, pages, near));
    if (moves.size() > most_moves()) {
      spdlog::warn(
          "pages of host memory are not sorted by their speed: that takes {} mappings; raise "
          "vm.max_map_count",
          2 * moves.size());
    } else {
      moved = move_pages(moves, mapping.data());
    }
    if (moved) candidates.log(pages);
  }
  // Where nothing was moved, what was tried is gone by now.
  mapping.touch(moved ? pages * kHugePage : 0, parts.mapped_bytes, [](uint64_t) {});
  parts.data = mapping.release();
  return parts;
}

HostParts take_host_parts(std::span<const uint64_t> bytes, MemoryBudget& budget, const std::string& what,
                          bool near_last, const Progress& progress) {
  const uint64_t total = std::accumulate(bytes.begin(), bytes.end(), uint64_t{0});
  if (total == 0) return layout_of(bytes);
  budget.take(total, what);
  try {
    return near_last && total >= kWorthSorting ? map_near_pages_last(bytes, budget, progress)
                                               : map_host_parts(bytes, progress);
  } catch (...) {
    budget.give_back(total);
    throw;
  }
}

}  // namespace lighter
