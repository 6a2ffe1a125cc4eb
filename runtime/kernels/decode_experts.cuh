// The experts' part of a decode program. Most blocks compute what lies in device memory: each has some pairs of gate
// and up rows, then some output rows of all slices, whose sums it adds up. The side blocks route, then do the same for
// what is read from host memory, and hand over their sums by slice.
#pragma once

#include "runtime/kernels/decode_block.cuh"
#include "runtime/kernels/decode_router.cuh"

namespace lighter::kernels {

__device__ inline unsigned load_system(const unsigned* at) {
  unsigned value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

__device__ inline void await_routing(const ExpertsPart& e, int lane) {
  if (lane == 0) {
    while (load_acquire(&e.sync->ready) == 0) __nanosleep(40);
  }
  __syncwarp();
}

// One thread. Once a wait of the step has failed, the later ones do not wait.
__device__ inline void await_cpu(const ExpertsPart& e) {
  const unsigned step = *e.router.step;
  if (load_system(e.cpu_done) != step) {
    ++*e.late;
    const unsigned long long begin = now_ns();
    while (load_system(e.cpu_done) != step) {
      if (now_ns() - begin > kWaitLimitMs * 1000000ull || *reinterpret_cast<volatile unsigned*>(e.error) != 0) {
        atomicCAS(e.error, 0, 1 + e.layer);
        break;
      }
    }
  }
  if (e.router.times != nullptr) note_time(&e.router.times->cpu);
  // What the CPU wrote before is in host memory, whoever reads it from now on.
  *reinterpret_cast<volatile unsigned*>(&e.sync->cpu_seen) = 1;
}

// values[pair] = silu(gate) * up for the warp's `pairs`, each times the expert's weight where that is wanted.
template <WeightFormat F>
__device__ __forceinline__ void run_pairs(const ExpertsPart& e, Warp& w, Range pairs, const JobList* weighed, const SharedX& x,
                          float* values) {
  for (int pair = pairs.begin; pair < pairs.end;) {
    const int count = pairs_of_run(e, pair, pairs.end);
    float weight = 1;
    if (weighed != nullptr) {
      weight = __ldcg(e.router.weights + __ldcg(&weighed->entries[pair / e.width].expert));
    }
    float gate = 0, up = 0;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const float sum = dot_rows<F>(w.ring, e.row, count, x, w.lane) * weight;
      (half == 0 ? gate : up) = sum;
    }
    if (w.lane < count) __stcg(values + pair + w.lane, gate / (1.0f + expf(-gate)) * up);
    pair += count;
  }
}

// The sums of a piece's whole rows, of which one has at most 32 pieces of 16 bytes. put(row, value).
template <WeightFormat F, int turns, typename Put>
__device__ __forceinline__ void sum_rows(const ExpertsPart& e, int row_shift, const std::byte* weights,
                                         const std::byte* scales, const std::byte* minimums, const SharedX& hidden,
                                         int lane, const Put& put) {
  const int lanes = 1 << row_shift, side = e.row_side, width = e.width;  // lanes: that share a row
  const int piece = lane & (lanes - 1), first_row = lane >> row_shift, rows = 32 >> row_shift;
  uint4 w[turns];
  float sums[turns];
#pragma unroll
  for (int i = 0; i < turns; ++i) w[i] = *reinterpret_cast<const uint4*>(weights + lane * 16 + i * 512);
#pragma unroll
  for (int i = 0; i < turns; ++i) {
    const int at = (first_row + i * rows) * side;
    sums[i] = dot_piece<F>(w[i], scales + at, minimums + at, hidden, width, piece, 0, 0.0f);
  }
  for (int step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < turns; ++i) sums[i] += __shfl_xor_sync(~0u, sums[i], step);
  }
  if (piece != 0) return;
#pragma unroll
  for (int i = 0; i < turns; ++i) put(first_row + i * rows, sums[i]);
}

// Calls put(job, row of the block, value) for all of the block's rows of all jobs. partial_groups: of the last job.
template <WeightFormat F, typename Put>
__device__ __forceinline__ void run_down(const ExpertsPart& e, Warp& w, Range block, int jobs, int partial_groups,
                                         const SharedX& x, const Put& put) {
  const int runs = runs_of_job(e, block), groups = e.width / e.group;
  const int row_shift = e.row_shift, row_pieces = 1 << row_shift, pieces = e.piece_rows * row_pieces;
  const int lanes = min(row_pieces, 32);  // that share a row
  for (int run = w.warp; run < jobs * runs; run += kWarps) {
    const int job = run / runs;
    const Range mine = pieces_of_run(e, block, run % runs);
    const SharedX hidden = x.from<F>(job, e.width);
    const int valid = (job == jobs - 1 ? partial_groups : groups) * e.group / Format<F>::piece_values;
    for (int piece_of_rows = mine.begin; piece_of_rows < mine.end; ++piece_of_rows) {
      const std::byte* const weights = w.ring.wait();
      const int at = (piece_of_rows - mine.begin) * e.piece_rows * e.row_side;
      const std::byte* const scales = w.ring.scales() + at;
      const std::byte* const minimums = w.ring.minimums() + at;
      const int first_row = (piece_of_rows - block.begin) * e.piece_rows;
      const auto put_row = [&](int row, float value) { put(job, first_row + row, value); };
      const bool whole = row_pieces <= 32 && valid == row_pieces;
      if (whole && pieces == 160) {
        sum_rows<F, 5>(e, row_shift, weights, scales, minimums, hidden, w.lane, put_row);
      } else if (whole && pieces == 128) {
        sum_rows<F, 4>(e, row_shift, weights, scales, minimums, hidden, w.lane, put_row);
      } else {
        float sum = 0;
        for (int i = w.lane; i < pieces; i += 32) {
          const int row = i >> row_shift, piece = i & (row_pieces - 1);
          if (piece < valid) {
            sum = dot_piece<F>(*reinterpret_cast<const uint4*>(weights + i * 16), scales + row * e.row_side,
                               minimums + row * e.row_side, hidden, e.width, piece, 0, sum);
          }
          if (((i - w.lane + 32) & (row_pieces - 1)) == 0 || row_pieces < 32) {  // the row is complete
            for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
            if ((w.lane & (lanes - 1)) == 0) put_row(row, sum);
            sum = 0;
          }
        }
      }
      w.ring.pass(piece_of_rows == mine.end - 1);
    }
  }
}

// Of a side block.
template <WeightFormat F>
__device__ __forceinline__ void run_side(const ExpertsPart& e, Warp& w, const Role& role, BlockMemory& block) {
  std::byte* const memory = block_shared() + block.scratch;
  route(e.router, memory, *e.sync, role.index, role.of);
  const JobList* const list = e.router.zero_copy;
  if (list == nullptr) return;
  LayerTimes* const times = e.router.times;
  await_routing(e, w.lane);
  const int groups = __ldcg(&list->groups), jobs = __ldcg(&list->jobs);
  const SharedX x = shared_x<F>(memory, e.hidden);
  load_normed_x<F>(x, e.input, memory + x_bytes<F>(e.hidden), e.hidden, w.warp, w.lane);
  run_pairs<F>(e, w, pairs_of(groups * e.group, role, w.warp), e.weighs_input ? list : nullptr, x, e.host_values);
  if (threadIdx.x == 0 && times != nullptr) note_time(&times->host_hidden);
  join(block, &e.sync->side, role.of);
  if (threadIdx.x == 0 && times != nullptr) note_time(&times->host_down_begun);
  const SharedX hidden = shared_x<F>(memory, jobs * e.width);
  load_x<F>(hidden, e.host_values, jobs, e.width, w.warp, w.lane);
  const Range share = pieces_of(e, role);
  const int first_row = share.begin * e.piece_rows;
  run_down<F>(e, w, share, jobs, groups - (jobs - 1) * (e.width / e.group), hidden,
              [&](int job, int row, float value) {
                if (!e.weighs_input) {
                  value = __fmul_rn(value, __ldcg(e.router.weights + __ldcg(&list->entries[job].expert)));
                }
                __stcg(e.partials + static_cast<int64_t>(job) * e.hidden + first_row + row, value);
              });
  if (threadIdx.x == 0 && times != nullptr) note_time(&times->host_down);
  join(block, &e.sync->host_done, 0);
}

// Of the other blocks.
template <WeightFormat F>
__device__ __forceinline__ void run_main(const ExpertsPart& e, Warp& w, const Role& role, BlockMemory& block) {
  std::byte* const memory = block_shared() + block.scratch;
  const JobList* const list = list_of(e, role);
  const JobList* const host_list = e.routes ? e.router.zero_copy : nullptr;
  LayerTimes* const times = e.routes ? e.router.times : nullptr;
  int list_groups = 0;
  {
    const SharedX x = shared_x<F>(memory, e.hidden);
    load_normed_x<F>(x, e.input, memory + x_bytes<F>(e.hidden), e.hidden, w.warp, w.lane);
#pragma unroll 1
    for (int listed = 0; listed < (list == nullptr ? 1 : 2); ++listed) {  // the fixed slices do not need the routing
      if (listed) {
        await_routing(e, w.lane);
        list_groups = __ldcg(&list->groups);
      }
      const int pairs = listed ? list_groups * e.group : e.fixed_jobs * e.width;
      run_pairs<F>(e, w, pairs_of(pairs, role, w.warp), listed && e.weighs_input ? list : nullptr, x,
                   e.values + (listed ? static_cast<int64_t>(e.fixed_jobs) * e.width : 0));
    }
  }
  if (threadIdx.x == 0 && times != nullptr) note_time(&times->device_hidden);
  if (!e.down) return;
  join(block, &e.sync->main, role.of);

  const int listed = list_groups / (e.width / e.group), jobs = e.fixed_jobs + listed;
  const Range share = pieces_of(e, role);
  const int first_row = share.begin * e.piece_rows, rows = (share.end - share.begin) * e.piece_rows;
  // Both lists' entries, hidden activations, sums by job: fixed ones, the list's, the host list's.
  auto* const entries = reinterpret_cast<SliceJob*>(memory);
  std::byte* const x_memory = reinterpret_cast<std::byte*>(entries + e.most_list_jobs);
  const SharedX hidden = shared_x<F>(x_memory, jobs * e.width);
  float* const parts = reinterpret_cast<float*>(x_memory + x_bytes<F>(jobs * e.width));
  load_x<F>(hidden, e.values, jobs, e.width, w.warp, w.lane);
  run_down<F>(e, w, share, jobs, e.width / e.group, hidden, [&](int job, int row, float value) {
    if (job >= e.fixed_jobs && !e.weighs_input) {
      value = __fmul_rn(value, __ldcg(e.router.weights + __ldcg(&list->entries[job - e.fixed_jobs].expert)));
    }
    parts[job * rows + row] = value;
  });

  float* const host_parts = parts + jobs * rows;
  int host_jobs = 0;
  if (threadIdx.x == 0 && times != nullptr) note_time(&times->device_down);
  if (host_list != nullptr) {
    host_jobs = __ldcg(&host_list->jobs);
    const auto fetch_entries = [&](const JobList* from, int count, SliceJob* to) {
      for (int i = threadIdx.x; i < count; i += kThreads) {
        reinterpret_cast<uint4*>(to)[i] = __ldcg(reinterpret_cast<const uint4*>(from->entries) + i);
      }
    };
    fetch_entries(list, listed, entries);
    fetch_entries(host_list, host_jobs, entries + listed);
    if (threadIdx.x == 0) await_count(&e.sync->host_done, e.side_blocks);
    sync_workers();
    for (int i = threadIdx.x; i < host_jobs * rows; i += kThreads) {
      host_parts[i] = __ldcg(e.partials + static_cast<int64_t>(i / rows) * e.hidden + first_row + i % rows);
    }
  }
  const bool awaits_cpu = e.routes && e.from_cpu != nullptr;
  if (awaits_cpu && threadIdx.x == 0) {
    if (role.index == 0) await_cpu(e);
    await_count(&e.sync->cpu_seen, 1);
  }
  sync_workers();
  for (int i = threadIdx.x; i < rows; i += kThreads) {
    const int row = first_row + i;
    const float before = e.residual != nullptr ? __ldcg(e.residual + row) : 0;
    float fixed = 0, routed = 0;
    for (int job = 0; job < e.fixed_jobs; ++job) fixed = __fadd_rn(fixed, parts[job * rows + i]);
    if (e.fixed_sum != nullptr) fixed = __ldcg(e.fixed_sum + row);
    if (e.sum != nullptr) {
      __stcg(e.sum + row, fixed);
      continue;
    }
    for (int here = 0, there = 0; here < listed || there < host_jobs;) {
      const bool from_host =
          there < host_jobs && (here == listed || entries[listed + there].position < entries[here].position);
      routed = __fadd_rn(routed, from_host ? host_parts[there * rows + i] : parts[(e.fixed_jobs + here) * rows + i]);
      ++(from_host ? there : here);
    }
    if (awaits_cpu) routed = __fadd_rn(routed, __ldcv(e.from_cpu + row));
    __stcg(e.residual + row, __fadd_rn(before, __fadd_rn(fixed, routed)));
  }
}

template <WeightFormat F>
__device__ __forceinline__ void run_experts(const ExpertsPart& e, Warp& w, BlockMemory& block) {
  const Role role = role_in(e);
  if (role.side) {
    run_side<F>(e, w, role, block);
  } else {
    run_main<F>(e, w, role, block);
  }
}

}  // namespace lighter::kernels
