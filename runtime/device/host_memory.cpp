#include "runtime/device/host_memory.h"

#include <sys/mman.h>
#include <tbb/parallel_for.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <string>

#include "runtime/bytes.h"
#include "runtime/error.h"

namespace lighter {

void* map_host_memory(size_t bytes) {
  const size_t slack = bytes >= kHugePage ? kHugePage : 0;
  void* mapped = mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    throw CapacityError("the system refused " + format_bytes(bytes) + " of host memory (" +
                        std::strerror(errno) + "); lower memory.host_budget or free memory");
  }
  if (slack == 0) return mapped;
  auto* const begin = static_cast<char*>(mapped);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  auto* const data = begin + before;
  const size_t page = 4096, used = (bytes + page - 1) / page * page;
  if (before > 0) munmap(begin, before);
  if (before + used < bytes + slack) munmap(data + used, bytes + slack - before - used);
  madvise(data, bytes, MADV_HUGEPAGE);  // A wish: without it all still works.
  return data;
}

void unmap_host_memory(void* data, size_t bytes) noexcept {
  munmap(data, bytes);
}

void touch_host_memory(void* data, size_t bytes) {
  const size_t blocks = (bytes + kHugePage - 1) / kHugePage;
  tbb::parallel_for(size_t{0}, blocks, [&](size_t block) {
    auto* at = static_cast<volatile char*>(data) + block * kHugePage;
    const size_t length = std::min(kHugePage, bytes - block * kHugePage);
    for (size_t offset = 0; offset < length; offset += 4096) at[offset] = 0;
  });
}

uint64_t machine_memory_bytes() {
  return static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

uint64_t available_memory_bytes() {
  std::ifstream file("/proc/meminfo");
  std::string key, unit;
  for (uint64_t kilobytes; file >> key >> kilobytes && std::getline(file, unit);) {
    if (key == "MemAvailable:") return kilobytes << 10;
  }
  return 0;
}

}  // namespace lighter
