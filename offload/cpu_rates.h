// How fast the CPU reads host memory: plainly, and as its experts do. Shared by calibration and benchmarks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "offload/cpu_experts.h"
#include "runtime/quant/cpu_slice.h"

namespace lighter::offload {

// Bytes that are small as int8, as nibbles, as bf16 and as fp16; each thread touches its own part first.
// memory: aligned to 8, like bytes.
void fill_with_weights(std::byte* memory, uint64_t bytes, int threads);

// One pass of all threads over the memory (aligned to 64), each over its own part. GB/s.
double host_read_rate(const std::byte* memory, uint64_t bytes, int threads);

// Slices of one format, one after the other all over filled memory, whose scales it sets. Does not own it.
class SliceField {
 public:
  SliceField(std::byte* memory, uint64_t bytes, SliceEncoding encoding, int64_t hidden, int64_t width);

  const CpuSliceKernel& kernel() const { return kernel_; }
  uint64_t slices() const { return count_; }
  // Any number; after the last comes the first.
  const std::byte* slice(uint64_t i) const { return memory_ + i % count_ * stride_; }

 private:
  CpuSliceKernel kernel_;
  std::byte* memory_;
  uint64_t stride_, count_;
};

// GB/s of weights: batches of slices for so many tokens each, one after the other, while go_on() says so.
double cpu_experts_rate(CpuExperts& cpu, const SliceField& field, int tokens,
                        const std::function<bool()>& go_on);

}  // namespace lighter::offload
