#include "runtime/torch/workspace_allocator.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "runtime/bytes.h"
#include "runtime/error.h"

namespace lighter {
// In front of every block, so that the block's own address is all that its deleter needs: oneDNN asks for
// memory whose context is the data itself.
struct WorkspaceAllocator::Header {
  std::shared_ptr<State> state;
  size_t bytes;
};

namespace {

constexpr size_t kAlignment = 64;

}  // namespace

c10::DataPtr WorkspaceAllocator::allocate(size_t bytes) {
  static_assert(sizeof(Header) <= kAlignment);
  const c10::Device cpu(c10::DeviceType::CPU);
  if (bytes == 0) return {nullptr, nullptr, &free_block, cpu};
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const uint64_t now = state_->used_bytes.fetch_add(rounded) + rounded;
  if (now > state_->limit_bytes) {
    state_->used_bytes.fetch_sub(rounded);
    throw CapacityError("the workspace of " + format_bytes(state_->limit_bytes) +
                        " is used up: a temporary of " + format_bytes(bytes) +
                        " does not fit; lower memory.prefill_chunk or memory.context");
  }
  uint64_t peak = state_->peak_bytes;
  while (now > peak && !state_->peak_bytes.compare_exchange_weak(peak, now)) {
  }
  auto* block = static_cast<std::byte*>(std::aligned_alloc(kAlignment, kAlignment + rounded));
  if (block == nullptr) {
    state_->used_bytes.fetch_sub(rounded);
    throw std::bad_alloc();
  }
  new (block) Header{state_, rounded};
  return {block + kAlignment, block + kAlignment, &free_block, cpu};
}

void WorkspaceAllocator::free_block(void* data) {
  if (data == nullptr) return;
  auto* block = static_cast<std::byte*>(data) - kAlignment;
  auto* header = reinterpret_cast<Header*>(block);
  header->state->used_bytes.fetch_sub(header->bytes);
  header->~Header();
  std::free(block);
}

c10::DeleterFnPtr WorkspaceAllocator::raw_deleter() const {
  return &free_block;
}

void WorkspaceAllocator::copy_data(void* to, const void* from, std::size_t bytes) const {
  std::memcpy(to, from, bytes);
}

}  // namespace lighter
