// libtorch's CPU allocator with a limit: temporaries on device cpu count as the workspace of the plan.
// Thread-safe.
#pragma once

#include <c10/core/Allocator.h>

#include <atomic>
#include <memory>

namespace lighter {

class WorkspaceAllocator final : public c10::Allocator {
 public:
  explicit WorkspaceAllocator(uint64_t limit_bytes) : state_(std::make_shared<State>(limit_bytes)) {}

  // Throws CapacityError at the limit.
  c10::DataPtr allocate(size_t bytes) override;
  c10::DeleterFnPtr raw_deleter() const override;
  void copy_data(void* to, const void* from, std::size_t bytes) const override;

  uint64_t peak_bytes() const { return state_->peak_bytes; }
  uint64_t used_bytes() const { return state_->used_bytes; }

 private:
  struct State {
    explicit State(uint64_t limit) : limit_bytes(limit) {}
    const uint64_t limit_bytes;
    std::atomic<uint64_t> used_bytes{0};
    std::atomic<uint64_t> peak_bytes{0};
  };
  struct Header;
  static void free_block(void* data);

  std::shared_ptr<State> state_;  // kept by every block, so that tensors may outlive the allocator
};

}  // namespace lighter
