// The quantized formats' work on a GPU, apart because a CPU build has no CUDA kernels. For up to 16 tokens
// the kernels read the packed slice as it is; more tokens are served by unpacking it to bf16 and a library
// GEMM.
#pragma once

#include "runtime/moe/slice_format.h"

namespace lighter::quantized_cuda {

// Fills in what accumulate needs beside x. x: [tokens, hidden] bf16 or fp32.
void prepare(Device& device, SliceShape shape, SliceEncoding encoding, ExpertInput& input);

void accumulate(Device& device, SliceShape shape, SliceEncoding encoding, const std::byte* slice,
                const ExpertInput& input, at::Tensor& sum);

}  // namespace lighter::quantized_cuda
