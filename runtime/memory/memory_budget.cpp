#include "runtime/memory/memory_budget.h"

#include <algorithm>

#include "runtime/bytes.h"
#include "runtime/error.h"

namespace lighter {

void MemoryBudget::take(uint64_t bytes, const std::string& what) {
  std::lock_guard lock(mutex_);
  if (bytes > limit_bytes_ - used_bytes_) {
    throw CapacityError(name_ + ": " + what + " needs " + format_bytes(bytes) + ", but only " +
                        format_bytes(limit_bytes_ - used_bytes_) + " of " + format_bytes(limit_bytes_) +
                        " are left; raise the budget, or lower offload.resident, memory.context or "
                        "memory.prefill_chunk");
  }
  used_bytes_ += bytes;
  peak_bytes_ = std::max(peak_bytes_, used_bytes_);
}

void MemoryBudget::give_back(uint64_t bytes) noexcept {
  std::lock_guard lock(mutex_);
  used_bytes_ -= bytes;
}

uint64_t MemoryBudget::used_bytes() const {
  std::lock_guard lock(mutex_);
  return used_bytes_;
}

uint64_t MemoryBudget::peak_bytes() const {
  std::lock_guard lock(mutex_);
  return peak_bytes_;
}

}  // namespace lighter
