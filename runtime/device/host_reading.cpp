#include "runtime/device/host_reading.h"

namespace lighter {
namespace {

typedef uint64_t Vector __attribute__((vector_size(64)));

inline __attribute__((always_inline)) uint64_t sum_of_vectors(const std::byte* from, uint64_t bytes) {
  Vector sums[4] = {};
  for (uint64_t at = 0; at < bytes; at += sizeof sums) {
    const auto* vectors = reinterpret_cast<const Vector*>(from + at);
    for (int i = 0; i < 4; ++i) sums[i] += vectors[i];
  }
  const Vector sum = sums[0] + sums[1] + sums[2] + sums[3];
  uint64_t total = 0;
  for (int i = 0; i < 8; ++i) total += sum[i];
  return total;
}

#if defined(__x86_64__)
__attribute__((target("avx512f"))) uint64_t sum_avx512(const std::byte* from, uint64_t bytes) {
  return sum_of_vectors(from, bytes);
}
__attribute__((target("avx2"))) uint64_t sum_avx2(const std::byte* from, uint64_t bytes) {
  return sum_of_vectors(from, bytes);
}
#endif

}  // namespace

uint64_t sum_of_words(const std::byte* from, uint64_t bytes) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return sum_avx512(from, bytes);
  if (__builtin_cpu_supports("avx2")) return sum_avx2(from, bytes);
#endif
  return sum_of_vectors(from, bytes);
}

}  // namespace lighter
