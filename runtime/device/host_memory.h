// Page-aligned host memory, on huge pages where the system grants them, touched by several threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lighter {

inline constexpr size_t kHugePage = size_t{2} << 20;

// From a huge page's boundary on. Throws CapacityError when the system has no memory left. Zero-filled.
void* map_host_memory(size_t bytes);
// Addresses without memory, until something is mapped there.
void* reserve_host_addresses(size_t bytes);
void unmap_host_memory(void* data, size_t bytes) noexcept;

// Makes every page present, in parallel: page faults of one thread reach only about 2 GB/s.
void touch_host_memory(void* data, size_t bytes);

// Of the machine, free or not, in bytes.
uint64_t machine_memory_bytes();
// What this process could still get without driving others to the disk, in bytes: of the machine, and of the
// control groups (version 2) that it runs in.
uint64_t available_memory_bytes();

}  // namespace lighter
