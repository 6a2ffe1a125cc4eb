// Host memory in several parts, with its near pages where they count most.
//
// On machines of several sockets, and on virtual ones that were given memory of several, a processor reads
// some pages at half the rate of others, and neither the program nor a virtual machine's system can ask
// which. So pages are timed, and moved to their addresses by the page table (mremap), which copies nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "runtime/device/device.h"
#include "runtime/memory/memory_budget.h"
#include "runtime/progress.h"

namespace lighter {

// One mapping. Part i begins at data + begins[i], a page's boundary, and ends where the next one begins, or
// the mapping does. May be unmapped part by part, with unmap_host_memory().
struct HostParts {
  std::byte* data = nullptr;
  uint64_t mapped_bytes = 0;
  std::vector<uint64_t> begins;

  std::byte* part(size_t i) const { return data + begins[i]; }
  uint64_t mapped_bytes_of(size_t i) const {
    return (i + 1 < begins.size() ? begins[i + 1] : mapped_bytes) - begins[i];
  }
};

// Whole pages, all of them present. bytes: of each part, not all 0. Throws CapacityError when the system has
// no memory left, and what progress throws.
HostParts map_host_parts(std::span<const uint64_t> bytes, const Progress& progress);

// Seconds that each huge page from `pages` on takes to be read.
using PageTimes =
    std::function<std::vector<float>(const std::byte* pages, size_t count, const Progress& progress)>;
// The shortest of three times, in random order, while all threads read.
std::vector<float> huge_page_times(const std::byte* pages, size_t count, const Progress& progress);

// Which pages are near: of the two groups whose means differ most clearly the faster one, if the other takes
// a quarter longer or more; else all.
std::vector<bool> near_ones(std::span<const float> times);

// The share of a part that may be far: as much as a GPU's link reads of it while the CPU reads the rest. The
// link is as fast from far pages, and the two then do not share one socket's memory.
inline constexpr double kFarShare = 0.25;

// As map_host_parts(), but what is near lies at the end of each part, the same portion of each. While more is
// far, others are tried, for about as long as the first ones took, and as far as the machine and the budget,
// whose spare they are meanwhile, have room; `bytes` are already entered there. Where pages cannot be moved,
// they stay as they are.
HostParts map_near_pages_last(std::span<const uint64_t> bytes, MemoryBudget& budget, const Progress& progress,
                              const PageTimes& times = huge_page_times);

// One or the other as buffers, entered in the budget. A few GiB are not worth sorting: caches would hold much
// of them while they are timed.
std::vector<Buffer> take_host_parts(std::span<const uint64_t> bytes, MemoryBudget& budget,
                                    const std::string& what, bool near_last, const Progress& progress);

}  // namespace lighter
