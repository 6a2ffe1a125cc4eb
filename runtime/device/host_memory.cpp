#include "runtime/device/host_memory.h"

#include <sys/mman.h>
#include <tbb/parallel_for.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>

#include "runtime/bytes.h"
#include "runtime/error.h"

namespace lighter {
namespace {

constexpr size_t kPage = 4096;

void* map_aligned(size_t bytes, int protection) {
  const size_t slack = bytes >= kHugePage ? kHugePage : 0;
  const int kind = MAP_PRIVATE | MAP_ANONYMOUS | (protection == PROT_NONE ? MAP_NORESERVE : 0);
  void* const mapped = mmap(nullptr, bytes + slack, protection, kind, -1, 0);
  if (mapped == MAP_FAILED) {
    throw CapacityError("the system refused " + format_bytes(bytes) + " of host memory (" +
                        std::strerror(errno) + "); lower memory.host_budget or free memory");
  }
  if (slack == 0) return mapped;
  auto* const begin = static_cast<char*>(mapped);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  auto* const data = begin + before;
  const size_t used = (bytes + kPage - 1) / kPage * kPage;
  if (before > 0) munmap(begin, before);
  if (before + used < bytes + slack) munmap(data + used, bytes + slack - before - used);
  return data;
}

// A figure that is a file's whole content; none: there is no limit, or no such file.
std::optional<uint64_t> figure_in(const std::filesystem::path& file) {
  std::ifstream in(file);
  uint64_t figure = 0;
  if (!(in >> figure)) return std::nullopt;
  return figure;
}

}  // namespace

void* map_host_memory(size_t bytes) {
  void* const data = map_aligned(bytes, PROT_READ | PROT_WRITE);
  if (bytes >= kHugePage) madvise(data, bytes, MADV_HUGEPAGE);  // A wish: without it all still works.
  return data;
}

void* reserve_host_addresses(size_t bytes) {
  return map_aligned(bytes, PROT_NONE);
}

void unmap_host_memory(void* data, size_t bytes) noexcept {
  munmap(data, bytes);
}

void touch_host_memory(void* data, size_t bytes) {
  const size_t blocks = (bytes + kHugePage - 1) / kHugePage;
  tbb::parallel_for(size_t{0}, blocks, [&](size_t block) {
    auto* at = static_cast<volatile char*>(data) + block * kHugePage;
    const size_t length = std::min(kHugePage, bytes - block * kHugePage);
    for (size_t offset = 0; offset < length; offset += kPage) at[offset] = 0;
  });
}

uint64_t machine_memory_bytes() {
  return static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

uint64_t available_memory_bytes() {
  uint64_t available = 0;
  std::ifstream machine("/proc/meminfo");
  std::string key, rest;
  for (uint64_t kilobytes; machine >> key >> kilobytes && std::getline(machine, rest);) {
    if (key == "MemAvailable:") available = kilobytes << 10;
  }
  std::ifstream own("/proc/self/cgroup");
  for (std::string line; std::getline(own, line);) {
    if (!line.starts_with("0::/")) continue;
    const std::filesystem::path root = "/sys/fs/cgroup";
    for (std::filesystem::path group = root / line.substr(4);; group = group.parent_path()) {
      const auto limit = figure_in(group / "memory.max"), used = figure_in(group / "memory.current");
      if (limit && used) available = std::min(available, *limit - std::min(*limit, *used));
      if (group == root || !group.has_relative_path()) break;
    }
  }
  return available;
}

}  // namespace lighter
