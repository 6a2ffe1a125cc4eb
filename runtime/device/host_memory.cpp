#include "runtime/device/host_memory.h"

#include <sys/mman.h>
#include <tbb/parallel_for.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "runtime/bytes.h"
#include "runtime/error.h"

namespace lighter {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace

void* map_host_memory(size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    throw CapacityError("the system refused " + format_bytes(bytes) + " of host memory (" +
                        std::strerror(errno) + "); lower memory.host_budget or free memory");
  }
  if (bytes >= kHugePage) madvise(data, bytes, MADV_HUGEPAGE);  // A wish: without it all still works.
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

}  // namespace lighter
