// How the two halves of the experts share out slices among blocks.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "runtime/kernels/decode.h"
#include "runtime/kernels/decode_dots.cuh"
#include "runtime/kernels/signals.cuh"

namespace lighter::kernels {

// Byte offsets in a slice; matrices: 0 gate, 1 up, 2 down.
template <WeightFormat F>
struct SliceLayout {
  int64_t values;  // bytes of one matrix
  int64_t sides;   // bytes of its scales

  __host__ __device__ SliceLayout(int64_t hidden, int64_t width)
      : values(Format<F>::bytes(hidden * width)), sides(side_bytes<F>(hidden * width)) {}
  __host__ __device__ int64_t matrix(int which) const { return which * values; }
  __host__ __device__ int64_t scales(int which) const { return 3 * values + which * sides; }
  __host__ __device__ int64_t minimums(int which) const { return 3 * values + (3 + which) * sides; }
  __host__ __device__ int64_t bytes() const { return 3 * (values + sides * (Format<F>::minimums ? 2 : 1)); }
};

// Lists are written while the kernel runs, so they are read past the first-level cache.
__device__ inline const std::byte* slice_at(const SliceJob& job) {
  return reinterpret_cast<const std::byte*>(__ldcg(reinterpret_cast<const unsigned long long*>(&job.slice)));
}

struct Range {
  int begin, end;
};

// Block `block`'s part of `count` things.
__device__ inline Range part_of(int count, int block, int blocks) {
  return {static_cast<int>(static_cast<int64_t>(count) * block / blocks),
          static_cast<int>(static_cast<int64_t>(count) * (block + 1) / blocks)};
}

// A row of slices of `width` rows that are taken one after the other: of those that a warp takes.
struct SliceRow {
  int row, job, in_job;

  __device__ SliceRow(int row, int width) : row(row), job(row / width), in_job(row % width) {}
  __device__ void next(int warps, int width) {
    row += warps;
    in_job += warps;
    for (; in_job >= width; in_job -= width) ++job;
  }
};

}  // namespace lighter::kernels
