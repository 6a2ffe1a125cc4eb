// What reader and writer of routing traces share; see trace.h.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace lighter::offload::trace_format {

static_assert(std::endian::native == std::endian::little, "traces are little-endian");

inline constexpr char kMagic[] = "LTRTRACE";
inline constexpr char kEnd[] = "LTR END";
inline constexpr size_t kMagicBytes = 8;
inline constexpr uint32_t kVersion = 1;
inline constexpr size_t kFrontBytes = kMagicBytes + 4 + 4;
inline constexpr size_t kFooterBytes = kMagicBytes + 8 + 8;
inline constexpr uint64_t kChecksumBegin = 0xcbf29ce484222325;

// FNV-1a, 64 bits.
inline uint64_t checksum(uint64_t so_far, const void* data, size_t bytes) {
  const auto* byte = static_cast<const unsigned char*>(data);
  for (size_t i = 0; i < bytes; ++i) so_far = (so_far ^ byte[i]) * 0x100000001b3;
  return so_far;
}

}  // namespace lighter::offload::trace_format
