// A hard limit on the bytes taken from one memory (the device's, or the host's).
//
// Every buffer that lighter takes is entered here before it is allocated, so a budget is never passed,
// not even for a moment while loading. Thread-safe.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>

namespace lighter {

class MemoryBudget {
 public:
  MemoryBudget(std::string name, uint64_t limit_bytes) : name_(std::move(name)), limit_bytes_(limit_bytes) {}

  MemoryBudget(const MemoryBudget&) = delete;
  MemoryBudget& operator=(const MemoryBudget&) = delete;

  // Enters bytes for `what`. Throws CapacityError, and enters nothing, if they would pass the limit.
  void take(uint64_t bytes, const std::string& what);
  void give_back(uint64_t bytes) noexcept;

  // What is held only to choose from, and given back before anything more is taken: as many whole units as there
  // is room for, `most` at most; returns the bytes. Within the limit, and not in the peak.
  uint64_t take_spare(uint64_t most, uint64_t unit);
  void give_back_spare(uint64_t bytes) noexcept;

  uint64_t limit_bytes() const { return limit_bytes_; }
  uint64_t used_bytes() const;
  uint64_t peak_bytes() const;

 private:
  const std::string name_;
  const uint64_t limit_bytes_;
  mutable std::mutex mutex_;
  uint64_t used_bytes_ = 0;
  uint64_t spare_bytes_ = 0;
  uint64_t peak_bytes_ = 0;
};

}  // namespace lighter
