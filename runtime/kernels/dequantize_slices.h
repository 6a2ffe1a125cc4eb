// CUDA: all or some slices of one expert as bf16 matrices, for products with many tokens.
#pragma once

#include <cstdint>

#include "runtime/kernels/quant_slice.h"

namespace lighter::kernels {

// The slices `first` to `first + count` of an expert of `total` slices, in device or mapped memory.
struct ExpertSlices {
  const void* const* slices = nullptr;  // array of `count` in host memory, copied into the launch
  int first = 0;
  int count = 0;  // up to max_slices
  int total = 0;
};

// gate_up: bf16 [2 * total * width, hidden], all gate rows first; down: bf16 [hidden, total * width]. Writes
// what belongs to the slices, rounded to nearest even. Enqueues on `stream` (a cudaStream_t) and returns at
// once; keeps no state; thread-safe. Throws ConfigError for other shapes, DeviceError if the launch fails.
void dequantize_slices(Encoding encoding, QuantSliceShape shape, const ExpertSlices& expert, void* gate_up,
                       void* down, void* stream);

}  // namespace lighter::kernels
