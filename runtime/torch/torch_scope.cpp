#include "runtime/torch/torch_scope.h"

#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/InferenceMode.h>

#include "runtime/torch/cuda_rules.h"
#include "runtime/torch/workspace_allocator.h"

namespace lighter {

namespace {

constexpr uint8_t kPriority = 100;  // libtorch takes the allocator of the highest priority

}  // namespace

struct TorchScope::Rules {
  Device& device;
  uint64_t workspace_bytes;
  c10::InferenceMode inference;
  std::unique_ptr<WorkspaceAllocator> cpu_workspace;
  std::unique_ptr<CudaRules> cuda;
  c10::Allocator* allocator_before = nullptr;
};

TorchScope::TorchScope(Device& device, uint64_t workspace_bytes, int threads) {
  device.device_budget().take(workspace_bytes, "workspace");
  rules_.reset(new Rules{device, workspace_bytes, c10::InferenceMode(), nullptr, nullptr, nullptr});
  // With a GPU the host's tensors are tiny, and waking a team of threads for them costs more than it brings.
  if (device.is_cuda()) threads = 1;
  if (threads > 0) at::set_num_threads(threads);
  if (device.is_cuda()) {
    rules_->cuda = make_cuda_rules(device, workspace_bytes);
  } else {
    rules_->cpu_workspace = std::make_unique<WorkspaceAllocator>(workspace_bytes);
    rules_->allocator_before = c10::GetCPUAllocator();
    c10::SetCPUAllocator(rules_->cpu_workspace.get(), kPriority);
  }
}

TorchScope::~TorchScope() {
  if (rules_->allocator_before != nullptr) c10::SetCPUAllocator(rules_->allocator_before, kPriority);
  rules_->device.device_budget().give_back(rules_->workspace_bytes);
}

uint64_t TorchScope::workspace_bytes() const {
  return rules_->workspace_bytes;
}

uint64_t TorchScope::peak_bytes() const {
  return rules_->cuda ? rules_->cuda->peak_bytes() : rules_->cpu_workspace->peak_bytes();
}

}  // namespace lighter
