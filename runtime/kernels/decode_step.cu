// The ends of a decode step.
#include <cuda_bf16.h>

#include <algorithm>

#include "runtime/kernels/decode.h"
#include "runtime/kernels/launch.cuh"

namespace lighter::kernels {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) begin_kernel(DecodeBegin b) {
  wait_for_previous_kernel();
  if (blockIdx.x == 0) {
    const auto* const row =
        static_cast<const uint4*>(b.embedding) + static_cast<int64_t>(b.input->token) * (b.hidden / 8);
    float* const to = b.residual;
    for (int i = threadIdx.x; i < b.hidden / 8; i += kThreads) {
      const uint4 v = row[i];
      const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        to[i * 8 + 2 * j] = __uint_as_float(words[j] << 16);
        to[i * 8 + 2 * j + 1] = __uint_as_float(words[j] & 0xffff0000);
      }
    }
    if (threadIdx.x == 0) *b.best = 0;
    return;
  }
  // The other block: everything else.
  for (int i = threadIdx.x; i < b.table_entries; i += kThreads) b.tables_to[i] = b.tables_from[i];
  constexpr int words = sizeof(StepInput) / 4;
  if (threadIdx.x < words) {
    reinterpret_cast<unsigned*>(b.state)[threadIdx.x] =
        reinterpret_cast<const unsigned*>(b.input)[threadIdx.x];
  }
  if (b.times != nullptr) {
    for (int i = threadIdx.x; i < b.layers; i += kThreads) b.times[i] = {};
  }
  if (threadIdx.x == 0) *b.error = *b.late = 0;
}

__global__ void __launch_bounds__(kThreads) end_kernel(DecodeEnd e) {
  wait_for_previous_kernel();
  for (int i = threadIdx.x; i < e.layers && e.times_from != nullptr; i += kThreads) e.times_to[i] = e.times_from[i];
  for (int i = threadIdx.x; i < e.chosen; i += kThreads) e.chosen_to[i] = e.chosen_from[i];
  if (threadIdx.x == 0) e.out->id = static_cast<int>(0xffffffffu - static_cast<unsigned>(*e.best));
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0) {
    constexpr unsigned infinity = 0xff800000u;  // as ranked
    e.out->late = *e.late;
    e.out->error = static_cast<unsigned>(*e.best >> 32) >= infinity ? kNotFinite : *e.error;
    __threadfence_system();
    *reinterpret_cast<volatile unsigned*>(&e.out->step) = e.state->step;
  }
}

}  // namespace

void decode_begin(const DecodeBegin& begin, void* stream) {
  launch(begin_kernel, dim3(2), kThreads, 0, stream, "begin of a step", begin);
}

void decode_end(const DecodeEnd& end, void* stream) {
  launch(end_kernel, dim3(1), kThreads, 0, stream, "end of a step", end);
}

}  // namespace lighter::kernels
