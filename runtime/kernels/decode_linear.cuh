// The linear part of a decode program: each warp has some consecutive rows of its block's.
#pragma once

#include "runtime/kernels/decode_part.cuh"

namespace lighter::kernels {

// The larger value wins, and of equal ones the lower row.
__device__ inline unsigned long long ranked(float value, int row) {
  const unsigned bits = __float_as_uint(value);
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(ordered) << 32 | (0xffffffffu - static_cast<unsigned>(row));
}

template <WeightFormat F>
__device__ __forceinline__ void run_linear(const LinearPart& a, Warp& w, std::byte* memory) {
  const SharedX x = shared_x<F>(memory, a.row.columns);
  if (a.normed.residual != nullptr) {
    load_normed_x<F>(x, a.normed, memory + x_bytes<F>(a.row.columns), a.row.columns, w.warp, w.lane);
  } else {
    load_x<F>(x, a.x, 1, a.row.columns, w.warp, w.lane);
  }
  const Range rows = rows_of(a, w.warp);
  unsigned long long best = 0;
  for (int row = rows.begin; row < rows.end;) {
    const int count = min(a.run_rows, rows.end - row);
    float* const to = a.out + row + w.lane;
    const float before = a.add && w.lane < count ? __ldcg(to) : 0.0f;
    const float sum = dot_rows<F>(w.ring, a.row, count, x, w.lane);
    if (w.lane < count) {
      __stcg(to, before + sum);
      best = max(best, ranked(sum, row + w.lane));
    }
    row += count;
  }
  if (a.best != nullptr) {
    for (int step = 16; step > 0; step /= 2) best = max(best, __shfl_xor_sync(~0u, best, step));
    if (w.lane == 0 && best != 0) atomicMax(a.best, best);
  }
}

}  // namespace lighter::kernels
