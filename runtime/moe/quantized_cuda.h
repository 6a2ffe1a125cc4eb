// The quantized formats' work on a GPU, apart because a CPU build has no CUDA kernels. For an expert with up
// to 16 tokens the kernels read the packed slices as they are; for more it is unpacked to bf16, slice by
// slice as they come, and two library products follow.
#pragma once

#include "runtime/moe/slice_format.h"

namespace lighter::quantized_cuda {

// Fills in what accumulate and finish need beside x and sum. x: bf16 or fp32.
void prepare(Device& device, SliceShape shape, SliceEncoding encoding, std::span<const RowRange> experts,
             int slices, RoutedInput& input);

void accumulate(Device& device, SliceShape shape, SliceEncoding encoding, int first,
                std::span<const std::byte* const> slices, const RoutedInput& input, RowRange rows);

void finish(const RoutedInput& input, RowRange rows);

}  // namespace lighter::quantized_cuda
