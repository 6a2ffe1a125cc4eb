#include "runtime/torch/cuda_rules.h"

#include <ATen/Context.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

// Declared in ATen/cuda/CUDAContextLight.h, which wants cuBLAS's headers; those are no part of a CUDA
// compiler.
namespace at::cuda {
TORCH_CUDA_CPP_API void clearCublasWorkspaces();
}

namespace lighter {
namespace {

class BoundCuda : public CudaRules {
 public:
  BoundCuda(Device& device, uint64_t workspace_bytes)
      : index_(static_cast<c10::DeviceIndex>(device.index())),
        guard_(c10::cuda::getStreamFromExternal(
            static_cast<cudaStream_t>(device.compute_stream().native_handle()), index_)) {
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    C10_CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total_bytes));
    c10::cuda::CUDACachingAllocator::resetPeakStats(index_);
    c10::cuda::CUDACachingAllocator::setMemoryFraction(
        static_cast<double>(workspace_bytes) / static_cast<double>(total_bytes), index_);
  }

  ~BoundCuda() override {
    // libtorch keeps a cuBLAS workspace for every stream that it has met, and freed blocks for ever.
    at::cuda::clearCublasWorkspaces();
    c10::cuda::CUDACachingAllocator::emptyCache();
  }

  uint64_t peak_bytes() const override {
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(index_);
    return static_cast<uint64_t>(stats.reserved_bytes[0].peak);
  }

 private:
  const c10::DeviceIndex index_;
  c10::cuda::CUDAStreamGuard guard_;
};

}  // namespace

std::unique_ptr<CudaRules> make_cuda_rules(Device& device, uint64_t workspace_bytes) {
  at::globalContext().lazyInitDevice(c10::DeviceType::CUDA);
  // cuDNN's attention makes a plan for every new number of keys, which takes 38 ms: once a token in decode.
  at::globalContext().setSDPUseCuDNN(false);
  return std::make_unique<BoundCuda>(device, workspace_bytes);
}

}  // namespace lighter
