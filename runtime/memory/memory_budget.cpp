#include "runtime/memory/memory_budget.h"

#include <algorithm>

#include "runtime/bytes.h"
#include "runtime/error.h"

namespace lighter {

void MemoryBudget::take(uint64_t bytes, const std::string& what) {
  std::lock_guard lock(mutex_);
  const uint64_t left = limit_bytes_ - used_bytes_ - spare_bytes_;
  if (bytes > left) {
    throw CapacityError(name_ + ": " + what + " needs " + format_bytes(bytes) + ", but only " +
                        format_bytes(left) + " of " + format_bytes(limit_bytes_) +
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

uint64_t MemoryBudget::take_spare(uint64_t most, uint64_t unit) {
  std::lock_guard lock(mutex_);
  const uint64_t taken = std::min(most, limit_bytes_ - used_bytes_ - spare_bytes_) / unit * unit;
  spare_bytes_ += taken;
  return taken;
}

void MemoryBudget::give_back_spare(uint64_t bytes) noexcept {
  std::lock_guard lock(mutex_);
  spare_bytes_ -= bytes;
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
