// The ends of a decode step, and where the CPU and the GPU meet.
#include <cuda_bf16.h>

#include <algorithm>

#include "runtime/kernels/decode.h"
#include "runtime/kernels/device_clock.cuh"
#include "runtime/kernels/launch.cuh"
#include "runtime/kernels/signals.cuh"
#include "runtime/moe/miss_mailbox.h"

namespace lighter::kernels {
namespace {

constexpr int kThreads = 256;

__device__ inline int best_id(unsigned long long best) {
  return static_cast<int>(0xffffffffu - static_cast<unsigned>(best));
}

// Does not let the next kernel begin: attention reads positions and tables without waiting for its
// predecessor.
__global__ void __launch_bounds__(kThreads) begin_kernel(DecodeBegin b) {
  wait_for_previous_kernel();
  const int token = blockIdx.x;
  const int slot = static_cast<int>(*b.completed % b.slots);
  const StepInput* const input = b.input + slot;
  if (token < b.tokens) {
    const int given = input->tokens[token];
    const int id = given == kFoundToken ? best_id(b.best[token]) : given;
    __syncthreads();
    const auto* const row =
        static_cast<const uint4*>(b.embedding) + static_cast<int64_t>(id) * (b.hidden / 8);
    float* const to = b.residual + token * b.hidden;
    for (int i = threadIdx.x; i < b.hidden / 8; i += kThreads) {
      const uint4 v = row[i];
      const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        to[i * 8 + 2 * j] = __uint_as_float(words[j] << 16);
        to[i * 8 + 2 * j + 1] = __uint_as_float(words[j] & 0xffff0000);
      }
    }
    if (threadIdx.x == 0) b.best[token] = 0;
    return;
  }
  // The last block: everything else.
  for (int i = threadIdx.x; i < b.table_entries; i += kThreads) {
    b.tables_to[i] = b.tables_from[slot * b.table_entries + i];
  }
  constexpr int words = sizeof(StepInput) / 4;
  if (threadIdx.x < words) {
    reinterpret_cast<unsigned*>(b.state)[threadIdx.x] = reinterpret_cast<const unsigned*>(input)[threadIdx.x];
  }
  if (b.times != nullptr) {
    for (int i = threadIdx.x; i < b.layers; i += kThreads) b.times[i] = {};
  }
  if (threadIdx.x == 0) {
    // What follows a step that has failed, before the host knows of it, shall not wait either.
    if (input->tokens[0] != kFoundToken) *b.error = 0;
  }
  __threadfence();
}

__global__ void __launch_bounds__(kThreads) end_kernel(DecodeEnd e) {
  wait_for_previous_kernel();
  const int slot = static_cast<int>(*e.completed % e.slots);
  StepOutput* const out = e.out + slot;
  for (int i = threadIdx.x; i < e.layers; i += kThreads) {
    e.signals[i] = {};
    if (e.times_from != nullptr) e.times_to[slot * e.layers + i] = e.times_from[i];
  }
  for (int i = threadIdx.x; i < e.chosen; i += kThreads) e.chosen_to[slot * e.chosen + i] = e.chosen_from[i];
  if (static_cast<int>(threadIdx.x) < e.tokens) {
    out->ids[threadIdx.x] = best_id(e.best[threadIdx.x]);
  }
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0) {
    constexpr unsigned infinity = 0xff800000u;  // as ranked
    ++*e.completed;
    out->error = static_cast<unsigned>(e.best[0] >> 32) >= infinity ? kNotFinite : *e.error;
    __threadfence_system();
    *reinterpret_cast<volatile unsigned*>(&out->step) = e.state->step;
  }
}

// One value of the CPU's result, and whose it is.
__device__ inline unsigned long long load_result(const MissResult* at) {
  return load_system(reinterpret_cast<const unsigned long long*>(at));
}

// The CPU's result is loaded when it is about to be there, and what is missing of it then again beside what the
// GPU has made, and again until it is there.
__global__ void __launch_bounds__(kThreads) combine_kernel(DecodeCombine c) {
  allow_next_kernel();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool there = i < c.tokens * c.hidden;
  const bool from_cpu = c.from_cpu != nullptr && there;
  unsigned long long result = 0;
  unsigned step = 0;
  if (c.from_cpu != nullptr) {
    step = *c.step;
    if (threadIdx.x == 0 && blockIdx.x == 0) {
      wait_for(c.cpu_ending, step, c.error, c.layer);
      store_release(&c.signals->cpu, 1);
      if (c.times != nullptr) note_time(&c.times->cpu);
    } else if (threadIdx.x == 0) {
      await<40>(&c.signals->cpu);
    }
    __syncthreads();
    if (from_cpu) result = load_result(c.from_cpu + i);
  }
  const auto is_here = [&] { return static_cast<unsigned>(result >> 32) == step; };
  wait_for_previous_kernel();
  if (from_cpu && !is_here()) result = load_result(c.from_cpu + i);
  float routed = 0, fixed = 0, before = 0;
  if (there) {
    const int positions = *c.positions;
    before = c.residual[i];
    if (c.fixed_sum != nullptr) fixed = __ldcg(c.fixed_sum + i);
#pragma unroll 16
    for (int p = 0; p < positions; ++p) {
      const float value = __ldcg(c.partials + p * c.tokens * c.hidden + i);  // there, if of no use
      if (c.computed[p]) routed = __fadd_rn(routed, value);
    }
  }
  const bool waits = from_cpu && !is_here();
  if (waits) {
    const Patience patience;
    do result = load_result(c.from_cpu + i);
    while (!is_here() && !patience.ends(c.error, c.layer));
  }
  if (from_cpu) routed = __fadd_rn(routed, __uint_as_float(static_cast<unsigned>(result)));
  if (there) c.residual[i] = __fadd_rn(__fadd_rn(before, fixed), routed);
  if (c.times != nullptr && __any_sync(~0u, waits) && threadIdx.x % 32 == 0) note_time(&c.times->cpu);
}

}  // namespace

void decode_begin(const DecodeBegin& begin, void* stream) {
  launch(begin_kernel, dim3(begin.tokens + 1), kThreads, 0, stream, "begin of a step", begin);
}

void decode_end(const DecodeEnd& end, void* stream) {
  launch(end_kernel, dim3(1), kThreads, 0, stream, "end of a step", end);
}

void decode_combine(const DecodeCombine& combine, void* stream) {
  const int64_t values = combine.tokens * combine.hidden;
  launch(combine_kernel, dim3(static_cast<unsigned>((values + kThreads - 1) / kThreads)), kThreads, 0, stream,
         "combine", combine);
}

}  // namespace lighter::kernels
