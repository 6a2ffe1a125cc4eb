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
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <random>
#include <utility>

#include "runtime/bytes.h"
#include "runtime/device/host_memory.h"
#include "runtime/device/host_reading.h"
#include "runtime/error.h"

namespace lighter {
namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kGiB = uint64_t{1} << 30;
constexpr double kTellingRatio = 1.25;
constexpr int kTimes = 3;
constexpr uint64_t kTouchedAtOnce = kGiB;  // between two calls of progress
constexpr uint64_t kWorthSorting = 4 * kGiB;
constexpr uint64_t kTriedAtOnce = 2 * kGiB;  // at least, since caches must not hold much of it
// Others are tried for as long as the first ones took, or so long.
constexpr std::chrono::seconds kSearchAlways{5};
constexpr uint64_t kLeftToOthers = 4 * kGiB;  // of the machine's memory, while others are tried
constexpr const char* kPreparing = "preparing host memory";
constexpr const char* kTiming = "timing host memory";

class Mapping {
 public:
  Mapping(void* data, uint64_t bytes) : data_(static_cast<std::byte*>(data)), bytes_(bytes) {}
  ~Mapping() {
    if (data_ != nullptr) unmap_host_memory(data_, bytes_);
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  std::byte* data() const { return data_; }
  std::byte* release() { return std::exchange(data_, nullptr); }

  // before: bytes that were touched elsewhere.
  void touch(uint64_t before, uint64_t total, const Progress& progress) const {
    for (uint64_t at = 0; at < bytes_; at += kTouchedAtOnce) {
      const uint64_t here = std::min(kTouchedAtOnce, bytes_ - at);
      touch_host_memory(data_ + at, here);
      progress(kPreparing, before + at + here, total);
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

struct Move {
  std::byte* from;
  size_t to;  // page
  size_t pages;
};

// Pages to choose from, in mappings of their own.
class Candidates {
 public:
  void add(size_t count, uint64_t total_bytes, const PageTimes& measure, const Progress& progress) {
    const uint64_t bytes = count * kHugePage;
    mappings_.push_back(std::make_unique<Mapping>(map_host_memory(bytes), bytes));
    const Mapping& mapping = *mappings_.back();
    const uint64_t before = pages_.size() * kHugePage;
    mapping.touch(before, std::max(total_bytes, before + bytes), progress);
    for (const float time : measure(mapping.data(), count, progress)) times_.push_back(time);
    for (size_t i = 0; i < count; ++i) {
      pages_.push_back({mapping.data() + i * kHugePage, mappings_.size()});
    }
    near_ = near_ones(times_);
    near_count_ = static_cast<size_t>(std::ranges::count(near_, true));
  }

  size_t near_count() const { return near_count_; }

  // A page for each of `wanted`, near ones where they are wanted; of both there are enough.
  std::vector<Move> moves(const std::vector<bool>& wanted) const {
    std::vector<Move> moves;
    size_t next[2] = {0, 0};  // far, near
    const Page* last = nullptr;
    for (size_t to = 0; to < wanted.size(); ++to) {
      size_t& i = next[wanted[to]];
      while (near_[i] != wanted[to]) ++i;
      const Page& page = pages_[i++];
      if (last != nullptr && last + 1 == &page && last->mapping == page.mapping) {
        ++moves.back().pages;
      } else {
        moves.push_back({page.data, to, 1});
      }
      last = &page;
    }
    return moves;
  }

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

 private:
  struct Page {
    std::byte* data;
    size_t mapping;
  };
  std::vector<std::unique_ptr<Mapping>> mappings_;
  std::vector<Page> pages_;
  std::vector<float> times_;
  std::vector<bool> near_;
  size_t near_count_ = 0;
};

// What the budget and the machine can spare for more candidates.
class Spare {
 public:
  explicit Spare(MemoryBudget& budget) : budget_(budget) {}
  ~Spare() { budget_.give_back_spare(bytes_); }
  Spare(const Spare&) = delete;
  Spare& operator=(const Spare&) = delete;

  // At most so many pages; how many.
  size_t take(size_t pages) {
    const uint64_t there = available_memory_bytes();
    const uint64_t room = there > kLeftToOthers ? there - kLeftToOthers : 0;
    const uint64_t taken = budget_.take_spare(std::min(pages * kHugePage, room), kHugePage);
    bytes_ += taken;
    return taken / kHugePage;
  }

 private:
  MemoryBudget& budget_;
  uint64_t bytes_ = 0;
};

// Every piece that is moved is a mapping of its own to the system, of which a process may have so many.
size_t most_moves() {
  constexpr size_t others = 8192;
  std::ifstream file("/proc/sys/vm/max_map_count");
  size_t most = 65530;
  file >> most;
  return most > others ? most - others : 0;
}

// False, and a warning: not all could be moved.
bool move_pages(const std::vector<Move>& moves, std::byte* to) {
  if (moves.size() > most_moves()) {
    spdlog::warn("host memory is not sorted by its speed: that takes {} mappings; raise vm.max_map_count",
                 moves.size());
    return false;
  }
  for (const auto& [from, page, pages] : moves) {
    const size_t bytes = pages * kHugePage;
    std::byte* const target = to + page * kHugePage;
    if (mremap(from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, target) != MAP_FAILED) {
      continue;
    }
    spdlog::warn("host memory is not sorted by its speed: the system would not move its pages ({})",
                 std::strerror(errno));
    // It may have unmapped the target before it failed.
    mmap(target, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return false;
  }
  return true;
}

// Near pages last; nullopt where they cannot be moved.
std::optional<HostParts> sorted_parts(HostParts parts, MemoryBudget& budget, const Progress& progress,
                                      const PageTimes& times) {
  const size_t pages = parts.mapped_bytes / kHugePage;
  Mapping mapping(reserve_host_addresses(parts.mapped_bytes), parts.mapped_bytes);
  {
    using Clock = std::chrono::steady_clock;
    Spare spare(budget);
    Candidates candidates;
    const auto began = Clock::now();
    candidates.add(pages, parts.mapped_bytes, times, progress);
    const auto first_took = Clock::now() - began;
    const auto until = Clock::now() + std::max<Clock::duration>(first_took, kSearchAlways);
    const auto enough = static_cast<size_t>(static_cast<double>(pages) * (1 - kFarShare));
    const size_t least = std::min<size_t>(pages, kTriedAtOnce / kHugePage);
    while (candidates.near_count() < enough && Clock::now() < until) {
      // In portions, each of which could be all that is needed.
      const size_t more = spare.take(std::max(least, enough - candidates.near_count()));
      if (more < least) break;
      try {
        candidates.add(more, parts.mapped_bytes, times, progress);
      } catch (const CapacityError&) {
        break;
      }
    }
    const size_t near = std::min(candidates.near_count(), pages);
    if (!move_pages(candidates.moves(most_wanted(parts, pages, near)), mapping.data())) return std::nullopt;
    candidates.log(pages);
  }
  // The rest, less than a huge page.
  std::byte* const rest = mapping.data() + pages * kHugePage;
  const uint64_t rest_bytes = parts.mapped_bytes - pages * kHugePage;
  if (rest_bytes > 0) {
    if (mprotect(rest, rest_bytes, PROT_READ | PROT_WRITE) != 0) return std::nullopt;
    touch_host_memory(rest, rest_bytes);
  }
  parts.data = mapping.release();
  return parts;
}

}  // namespace

HostParts map_host_parts(std::span<const uint64_t> bytes, const Progress& progress) {
  HostParts parts = layout_of(bytes);
  Mapping mapping(map_host_memory(parts.mapped_bytes), parts.mapped_bytes);
  mapping.touch(0, parts.mapped_bytes, progress);
  parts.data = mapping.release();
  return parts;
}

std::vector<float> huge_page_times(const std::byte* pages, size_t count, const Progress& progress) {
  using Clock = std::chrono::steady_clock;
  constexpr size_t at_once = 4 * kGiB / kHugePage;  // between two calls of progress
  std::vector<float> times(count, std::numeric_limits<float>::max());
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  std::minstd_rand random;
  std::atomic<uint64_t> sum = 0;  // used, so that the reading is not left out
  for (size_t turn = 0; turn < kTimes; ++turn) {
    std::ranges::shuffle(order, random);
    for (size_t first = 0; first < count; first += at_once) {
      const size_t last = std::min(first + at_once, count);
      tbb::parallel_for(first, last, [&](size_t k) {
        const size_t page = order[k];
        const auto begin = Clock::now();
        sum.fetch_add(sum_of_words(pages + page * kHugePage, kHugePage), std::memory_order_relaxed);
        times[page] = std::min(times[page], std::chrono::duration<float>(Clock::now() - begin).count());
      });
      progress(kTiming, (turn * count + last) * kHugePage, kTimes * count * kHugePage);
    }
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
  const HostParts parts = layout_of(bytes);
  if (parts.mapped_bytes >= kHugePage) {
    if (auto sorted = sorted_parts(parts, budget, progress, times)) return *std::move(sorted);
  }
  return map_host_parts(bytes, progress);
}

std::vector<Buffer> take_host_parts(std::span<const uint64_t> bytes, MemoryBudget& budget,
                                    const std::string& what, bool near_last, const Progress& progress) {
  const uint64_t total = std::accumulate(bytes.begin(), bytes.end(), uint64_t{0});
  std::vector<Buffer> buffers(bytes.size());
  if (total == 0) return buffers;
  budget.take(total, what);
  HostParts parts;
  try {
    parts = near_last && total >= kWorthSorting ? map_near_pages_last(bytes, budget, progress)
                                                : map_host_parts(bytes, progress);
  } catch (...) {
    budget.give_back(total);
    throw;
  }
  for (size_t i = 0; i < bytes.size(); ++i) {
    if (bytes[i] == 0) continue;
    buffers[i] = Buffer(parts.part(i), bytes[i],
                        [&budget, mapped = parts.mapped_bytes_of(i), entered = bytes[i]](void* memory) {
                          unmap_host_memory(memory, mapped);
                          budget.give_back(entered);
                        });
  }
  return buffers;
}

}  // namespace lighter
