// The experts' two halves. gate_up: a block has some consecutive pairs of gate and up rows of the fixed
// slices and some of the list's, a warp takes every kStreamWarps-th. down: a block has some output rows of
// all slices and adds up the slices in their order.
#include <algorithm>

#include "runtime/kernels/decode_router.cuh"
#include "runtime/kernels/decode_values.cuh"
#include "runtime/kernels/launch.cuh"

namespace lighter::kernels {
namespace {

constexpr int kThreads = kStreamWarps * 32;

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

__device__ inline unsigned load_acquire(const unsigned* at) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

// Lists are written while the kernel runs, so they are read past the first-level cache.
__device__ inline const std::byte* slice_at(const SliceJob& job) {
  return reinterpret_cast<const std::byte*>(__ldcg(reinterpret_cast<const unsigned long long*>(&job.slice)));
}

struct Range {
  int begin, end;
};

// Block `block`'s part of `count` things, multiples of `unit` but for the end.
__device__ inline Range part_of(int count, int block, int blocks) {
  return {static_cast<int>(static_cast<int64_t>(count) * block / blocks),
          static_cast<int>(static_cast<int64_t>(count) * (block + 1) / blocks)};
}

struct GateUp {
  RowShape row;
  StreamShape stream;
  NormedInput input;
  int width, groups_per_slice;
  const std::byte* fixed;
  int fixed_jobs;
  const JobList* list;
  const float* input_weights;
  int experts;
  HiddenActivations out;
  const unsigned* ready;
};

// Quantizes the groups that this block's results have completed. ranges: pairs; jobs: the first job of each.
template <WeightFormat F, int B>
__device__ void finish_groups(const GateUp& a, const Range (&ranges)[2], unsigned char* last) {
  constexpr int group = Format<F>::group;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int first_group[2], groups[2];
  for (int part = 0; part < 2; ++part) {
    const Range r = ranges[part];
    first_group[part] = r.begin / group;
    groups[part] = r.begin < r.end ? (r.end - 1) / group - r.begin / group + 1 : 0;
  }
  const int count = groups[0] + groups[1];
  const auto group_of = [&](int i) {  // number through all jobs, fixed ones first
    return i < groups[0] ? first_group[0] + i
                         : a.fixed_jobs * a.groups_per_slice + first_group[1] + i - groups[0];
  };
  __threadfence();
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int part = i < groups[0] ? 0 : 1;
    const int begin = (first_group[part] + i - (part == 0 ? 0 : groups[0])) * group;
    const int mine = min(ranges[part].end, begin + group) - max(ranges[part].begin, begin);
    unsigned* const counter = a.out.finished + group_of(i);
    const bool done = atomicAdd(counter, mine) + mine == group;
    if (done) *counter = 0;
    last[i] = done;
  }
  __syncthreads();
  constexpr int lanes = group / 4;  // of a group
  for (int i = warp; i < count * B; i += kStreamWarps) {
    if (!last[i / B]) continue;
    __threadfence();
    const int number = group_of(i / B);
    const int64_t to = (static_cast<int64_t>(number / a.groups_per_slice) * B + i % B) * a.width +
                       number % a.groups_per_slice * group;
    const float4 v = __ldcg(reinterpret_cast<const float4*>(a.out.unquantized + to) + lane % lanes);
    float scale, sum;
    const uint32_t q = quantize4<group>(v, lane, scale, sum);
    if (lane < lanes) reinterpret_cast<uint32_t*>(static_cast<std::byte*>(a.out.values) + to)[lane] = q;
    if (lane == 0) {
      a.out.scales[to / group] = scale;
      if constexpr (Format<F>::minimums) a.out.sums[to / group] = sum;
    }
  }
}

template <WeightFormat F, int B>
__device__ void gate_up_block(const GateUp& a, std::byte* shared, int block, int blocks) {
  constexpr int group = Format<F>::group;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  WarpStream stream(shared, a.stream, warp, lane);
  std::byte* const x_memory = shared + a.stream.bytes();
  const SharedX x = shared_x<F>(x_memory, a.row.columns, B);
  float* const scratch = reinterpret_cast<float*>(x_memory + x_bytes<F>(a.row.columns, B));
  const SliceLayout<F> layout(a.row.columns, a.width);
  const int64_t row_bytes = static_cast<int64_t>(a.row.segment_bytes) * a.row.segments;

  const Range fixed = part_of(a.fixed_jobs * a.width, block, blocks);
  Range listed{0, 0};
  bool list_known = false;
  const auto await_list = [&] {
    if (list_known) return;
    list_known = true;
    if (a.list == nullptr) return;
    if (a.ready != nullptr) {
      while (load_acquire(a.ready) == 0) __nanosleep(40);
    }
    listed = part_of(__ldcg(&a.list->groups) * group, block, blocks);
  };

  // Of the issuing lane: the row to come. It is in the fixed slices first, then in the list's.
  int ahead = fixed.begin + warp, ahead_matrix = 0, ahead_segment = 0, ahead_job = -1, in_flight = 0;
  bool ahead_in_list = false;
  const std::byte* ahead_slice = nullptr;
  const auto issue = [&](bool may_wait) {
    if (!ahead_in_list && ahead >= fixed.end) {
      if (!may_wait) return false;
      await_list();
      ahead_in_list = true;
      ahead = listed.begin + warp;
      ahead_job = -1;
    }
    if (ahead_in_list && ahead >= listed.end) return false;
    const int job = ahead / a.width, in_slice = ahead % a.width;
    if (job != ahead_job) {
      ahead_slice = ahead_in_list ? slice_at(a.list->entries[job]) : a.fixed + job * layout.bytes();
      ahead_job = job;
    }
    const std::byte* const from = ahead_slice + layout.matrix(ahead_matrix) + in_slice * row_bytes +
                                  ahead_segment * a.row.segment_bytes;
    const int64_t side = static_cast<int64_t>(in_slice) * a.row.side;
    const bool sides = Format<F>::quantized && ahead_segment == 0;
    stream.issue(from, a.row.segment_bytes,
                 sides ? ahead_slice + layout.scales(ahead_matrix) + side : nullptr,
                 sides && Format<F>::minimums ? ahead_slice + layout.minimums(ahead_matrix) + side : nullptr,
                 a.row.side);
    ++in_flight;
    if (++ahead_segment == a.row.segments) {
      ahead_segment = 0;
      ahead_matrix ^= 1;
      if (ahead_matrix == 0) ahead += kStreamWarps;
    }
    return true;
  };
  const auto fill = [&](bool may_wait) {
    while (in_flight < a.stream.stages && issue(may_wait)) {
    }
  };
  if (lane == 0) fill(false);
  const NormWeights norm(a.input, a.row.columns, warp, lane);
  allow_next_kernel();
  wait_for_previous_kernel();
  load_normed_x<F, B>(x, a.input, norm, scratch, a.row.columns, warp, lane);
  const auto refill = [&] {
    if (lane != 0) return;
    --in_flight;
    fill(true);
  };

  int weight_job = -1;
  float weight = 1;
  for (int part = 0; part < 2; ++part) {
    if (part == 1) {
      if (lane == 0) {
        await_list();
        fill(true);
      }
      __syncwarp();
      listed.begin = __shfl_sync(~0u, listed.begin, 0);
      listed.end = __shfl_sync(~0u, listed.end, 0);
    }
    const Range pairs = part == 0 ? fixed : listed;
    for (int pair = pairs.begin + warp; pair < pairs.end; pair += kStreamWarps) {
      const int job = pair / a.width;
      if (part == 1 && a.input_weights != nullptr && lane < B && job != weight_job) {
        weight_job = job;
        weight = __ldcg(a.input_weights + lane * a.experts + __ldcg(&a.list->entries[job].expert));
      }
      float gate[B], up[B];
      dot_row<F, B>(stream, a.row, x, lane, gate, refill);
      dot_row<F, B>(stream, a.row, x, lane, up, refill);
      const int64_t to =
          static_cast<int64_t>(part == 0 ? job : a.fixed_jobs + job) * B * a.width + pair % a.width;
#pragma unroll
      for (int b = 0; b < B; ++b) {
        if (lane != b) continue;
        const float g = gate[b] * weight;
        const float value = g / (1.0f + expf(-g)) * (up[b] * weight);
        if constexpr (Format<F>::quantized) {
          a.out.unquantized[to + b * a.width] = value;
        } else {
          static_cast<__nv_bfloat16*>(a.out.values)[to + b * a.width] = __float2bfloat16_rn(value);
        }
      }
    }
  }
  if constexpr (Format<F>::quantized) {
    const Range ranges[2] = {fixed, listed};
    finish_groups<F, B>(a, ranges, reinterpret_cast<unsigned char*>(x_memory));
  }
}

// Blocks in this order: `routing` of the router, then `host.blocks` that read host memory, then those of `a`,
// which begin with the fixed slices, for which routing does not matter.
struct GateUpRoles {
  int routing = 0, host = 0;
  DecodeRouter router;
  unsigned* ready = nullptr;
  LayerTimes* times = nullptr;
};

template <WeightFormat F, int B>
__global__ void __launch_bounds__(kThreads, 2)
    gate_up_kernel(const __grid_constant__ GateUp a, const __grid_constant__ GateUp host,
                   const __grid_constant__ GateUpRoles roles) {
  extern __shared__ __align__(128) std::byte shared[];
  const int block = blockIdx.x;
  if (block < roles.routing) {
    route(roles.router, shared, roles.ready, block, roles.routing);
  } else if (block < roles.routing + roles.host) {
    gate_up_block<F, B>(host, shared, block - roles.routing, roles.host);
    if (threadIdx.x == 0 && roles.times != nullptr) note_time(&roles.times->host_hidden);
  } else {
    const int before = roles.routing + roles.host;
    gate_up_block<F, B>(a, shared, block - before, gridDim.x - before);
    if (threadIdx.x == 0 && roles.times != nullptr) note_time(&roles.times->device_hidden);
  }
}

template <WeightFormat F, int B>
void run_gate_up(const DecodeGateUp& g, void* stream) {
  GateUp a{};
  a.row = row_shape<F>(g.hidden);
  a.input = g.input;
  a.width = static_cast<int>(g.width);
  a.groups_per_slice = a.width / Format<F>::group;
  a.fixed = g.fixed;
  a.fixed_jobs = g.fixed_jobs;
  a.list = g.list;
  a.input_weights = g.input_weights;
  a.experts = g.experts;
  a.out = g.out;
  a.stream.side_bytes = a.row.side * (Format<F>::minimums ? 2 : 1);
  const int64_t rest = x_bytes<F>(g.hidden, B) + B * kStreamWarps * 4;
  a.stream.stage_bytes = a.row.segment_bytes;
  a.stream.stages = stages_that_fit(a.stream.stage_bytes, a.stream.side_bytes, rest);
  GateUpRoles roles;
  roles.times = g.times;
  if (g.router != nullptr) {
    roles.routing = router_blocks(*g.router);
    roles.router = *g.router;
    roles.ready = g.ready;
    a.ready = g.ready;
  }
  GateUp host = a;
  host.fixed_jobs = 0;
  host.list = g.host_list;
  host.out = g.host_out;
  if (g.host_list != nullptr) roles.host = g.host_blocks;
  const int64_t bytes = std::max<int64_t>(a.stream.bytes() + rest, sizeof(RouterScratch));
  // One block on each multiprocessor leaves the next kernel its place there. (int4 is better off with more: it
  // computes more for a byte.)
  const int workers = processors() - (F == WeightFormat::int4 ? 0 : roles.routing);
  launch(gate_up_kernel<F, B>, dim3(roles.routing + roles.host + workers), kThreads, bytes, stream, "gate and up",
         a, host, roles);
}

struct Down {
  StreamShape stream;
  int hidden, width, rows, row_bytes, row_shift;  // rows: of a unit; 16 << row_shift is row_bytes
  const std::byte* fixed;
  int fixed_jobs;
  const JobList* list;
  const unsigned* ready;
  const float* output_weights;
  int experts;
  HiddenActivations hidden_activations;
  float *residual, *fixed_sum, *partials;
  int most_jobs, most_rows;
  unsigned long long *begun, *ended;  // times to note, or null
};

template <WeightFormat F, int B>
__device__ void down_block(const Down& a, std::byte* shared, int block, int blocks) {
  constexpr int group = Format<F>::group;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  WarpStream stream(shared, a.stream, warp, lane);
  const int values_bytes = Format<F>::quantized ? a.width : 2 * a.width;  // of a token's hidden activations
  const int groups = a.width / group;
  auto* const listed = reinterpret_cast<SliceJob*>(shared + a.stream.bytes());  // the list's entries
  std::byte* const x_q = reinterpret_cast<std::byte*>(listed + a.most_jobs);    // [jobs, B, width]
  float* const x_scales = reinterpret_cast<float*>(x_q + a.most_jobs * B * values_bytes);
  float* const x_sums = x_scales + (Format<F>::quantized ? a.most_jobs * B * groups : 0);
  float* const parts = x_sums + (Format<F>::minimums ? a.most_jobs * B * groups : 0);  // [jobs, rows, B]
  const SliceLayout<F> layout(a.hidden, a.width);

  const Range chunk_range = part_of(a.hidden / a.rows, block, blocks);
  const int first_row = chunk_range.begin * a.rows, chunks = chunk_range.end - chunk_range.begin;
  const int my_rows = chunks * a.rows;
  const int row_side = static_cast<int>(side_bytes<F>(a.width));
  int jobs = a.fixed_jobs, partial_groups = groups;  // partial_groups: of the last job

  int ahead_job = warp / chunks, ahead_chunk = warp % chunks, in_flight = 0;
  const auto fill = [&] {
    for (; in_flight < a.stream.stages && ahead_job < jobs; ++in_flight) {
      const int job = ahead_job, row = first_row + ahead_chunk * a.rows;
      const std::byte* const slice =
          job < a.fixed_jobs ? a.fixed + job * layout.bytes() : listed[job - a.fixed_jobs].slice;
      const std::byte* const from = slice + layout.matrix(2) + static_cast<int64_t>(row) * a.row_bytes;
      const std::byte* const scales =
          Format<F>::quantized ? slice + layout.scales(2) + row * row_side : nullptr;
      const std::byte* const minimums =
          Format<F>::minimums ? slice + layout.minimums(2) + row * row_side : nullptr;
      if (job == jobs - 1 && partial_groups < groups) {
        const auto bytes = static_cast<uint32_t>(Format<F>::bytes(partial_groups * group));
        stream.issue_rows(from, a.rows, bytes, a.row_bytes, scales, minimums, a.rows * row_side);
      } else {
        stream.issue(from, a.rows * a.row_bytes, scales, minimums, a.rows * row_side);
      }
      ahead_chunk += kStreamWarps;
      for (; ahead_chunk >= chunks; ahead_chunk -= chunks) ++ahead_job;
    }
  };
  const auto read_list = [&] {
    const int count = __ldcg(&a.list->jobs);
    for (int i = threadIdx.x; i < count; i += kThreads) {
      reinterpret_cast<uint4*>(listed)[i] = __ldcg(reinterpret_cast<const uint4*>(a.list->entries) + i);
    }
    jobs += count;
    if (count > 0) partial_groups = __ldcg(&a.list->groups) - (count - 1) * groups;
    __syncthreads();
    if (lane == 0) fill();
  };
  if (lane == 0) fill();
  allow_next_kernel();
  if (a.ready != nullptr) {  // the list is there long before the hidden activations are
    if (threadIdx.x == 0) {
      while (load_acquire(a.ready) == 0) __nanosleep(100);
    }
    __syncthreads();
    read_list();
  }
  wait_for_previous_kernel();
  if (threadIdx.x == 0) note_time(a.begun);
  if (a.ready == nullptr && a.list != nullptr) read_list();
  const HiddenActivations& h = a.hidden_activations;
  for (int i = threadIdx.x; i < jobs * B * values_bytes / 16; i += kThreads) {
    const uint4 v = __ldcg(reinterpret_cast<const uint4*>(h.values) + i);
    int to = i * 16;
    if (F == WeightFormat::int4) {
      const int token = to / a.width, value = to % a.width;
      to = token * a.width + place_of<F>(value, a.width);
    }
    *reinterpret_cast<uint4*>(x_q + to) = v;
  }
  if constexpr (Format<F>::quantized) {
    for (int i = threadIdx.x; i < jobs * B * groups; i += kThreads) {
      x_scales[i] = __ldcg(h.scales + i);
      if constexpr (Format<F>::minimums) x_sums[i] = __ldcg(h.sums + i);
    }
  }
  __syncthreads();

  const int row_pieces = 1 << a.row_shift, pieces = a.rows * row_pieces;
  const int lanes = min(row_pieces, 32);  // that share a row
  int job = warp / chunks, chunk = warp % chunks;
  for (; job < jobs; chunk += kStreamWarps) {
    for (; chunk >= chunks; chunk -= chunks) ++job;
    if (job >= jobs) break;
    const int valid = (job == jobs - 1 ? partial_groups : groups) * group / Format<F>::piece_values;
    const SharedX x = {x_q + job * B * values_bytes, x_scales + job * B * groups, x_sums + job * B * groups};
    const std::byte* const weights = stream.wait();
    const std::byte* const sides = stream.side();
    float sum[B] = {};
#pragma unroll 4
    for (int i = lane; i < pieces; i += 32) {
      const int row = i >> a.row_shift, piece = i & (row_pieces - 1);
      if (piece < valid) {
        const std::byte* const scales = sides + row * row_side;
        dot_piece<F, B>(*reinterpret_cast<const uint4*>(weights + i * 16), scales, scales + a.rows * row_side,
                        x, a.width, piece, sum);
      }
      if (((i - lane + 32) & (row_pieces - 1)) == 0 || row_pieces < 32) {  // the row is complete
#pragma unroll
        for (int b = 0; b < B; ++b) {
          for (int step = lanes / 2; step > 0; step /= 2) sum[b] += __shfl_xor_sync(~0u, sum[b], step);
          if ((lane & (lanes - 1)) == 0) parts[(job * my_rows + chunk * a.rows + row) * B + b] = sum[b];
          sum[b] = 0;
        }
      }
    }
    stream.pass();
    if (Format<F>::quantized) stream.next_side();
    if (lane == 0) {
      --in_flight;
      fill();
    }
  }
  __syncthreads();

  const int values = my_rows * B, routed_jobs = jobs - a.fixed_jobs;
  const auto at_of = [&](int i) { return static_cast<int64_t>(i % B) * a.hidden + first_row + i / B; };
  const auto routed_value = [&](int job, int i) {
    const float value = parts[(a.fixed_jobs + job) * values + i];
    if (a.output_weights == nullptr) return value;
    return __fmul_rn(value, __ldcg(a.output_weights + i % B * a.experts + listed[job].expert));
  };
  if (a.partials != nullptr) {
    for (int i = threadIdx.x; i < values * routed_jobs; i += kThreads) {
      const int job = i / values, value = i % values;
      a.partials[static_cast<int64_t>(listed[job].position) * B * a.hidden + at_of(value)] =
          routed_value(job, value);
    }
  }
  for (int i = threadIdx.x; i < values; i += kThreads) {
    float fixed = 0, routed = 0;
#pragma unroll 8
    for (int job = 0; job < a.fixed_jobs; ++job) fixed = __fadd_rn(fixed, parts[job * values + i]);
    if (a.residual != nullptr) {
#pragma unroll 8
      for (int job = 0; job < routed_jobs; ++job) routed = __fadd_rn(routed, routed_value(job, i));
      a.residual[at_of(i)] = __fadd_rn(a.residual[at_of(i)], __fadd_rn(fixed, routed));
    }
    if (a.fixed_sum != nullptr) a.fixed_sum[at_of(i)] = fixed;
  }
  if (threadIdx.x == 0) note_time(a.ended);
}

// The first blocks read host memory.
template <WeightFormat F, int B>
__global__ void __launch_bounds__(kThreads, 2)
    down_kernel(const __grid_constant__ Down a, const __grid_constant__ Down host, int host_blocks) {
  extern __shared__ __align__(128) std::byte shared[];
  const int block = blockIdx.x;
  if (block < host_blocks) {
    down_block<F, B>(host, shared, block, host_blocks);
  } else {
    down_block<F, B>(a, shared, block - host_blocks, gridDim.x - host_blocks);
  }
}

// Sets what depends on how many blocks there are; returns the shared memory of one.
template <WeightFormat F, int B>
int64_t share_rows(Down& a, int blocks) {
  a.most_rows = (a.hidden / a.rows + blocks - 1) / blocks * a.rows;
  const int64_t rest =
      static_cast<int64_t>(a.most_jobs) * (x_bytes<F>(a.width, B) + a.most_rows * B * 4 + sizeof(SliceJob));
  a.stream.stages = stages_that_fit(a.stream.stage_bytes, a.stream.side_bytes, rest);
  return a.stream.bytes() + rest;
}

// Rows that are copied and computed at once: a block should have little more than its share of them, in few
// copies. 0: none will do.
int rows_of_a_piece(int hidden, int row_bytes, int row_side) {
  constexpr double copies_cost = 600;  // bytes that could be read meanwhile
  int best = 0;
  double least = 0;
  for (const int rows : {20, 16, 10, 8, 5, 4, 2, 1}) {
    if (hidden % rows != 0 || rows * row_bytes > kStageBytes || rows * row_side % 16 != 0 ||
        rows * row_bytes % 512 != 0) {
      continue;
    }
    const int pieces = (hidden / rows + processors() - 1) / processors();  // of the block that has most
    const double cost = pieces * (rows * row_bytes + copies_cost);
    if (best == 0 || cost < least) {
      best = rows;
      least = cost;
    }
  }
  return best;
}

template <WeightFormat F, int B>
void run_down(const DecodeDown& d, void* stream) {
  Down a{};
  a.hidden = static_cast<int>(d.hidden);
  a.width = static_cast<int>(d.width);
  a.row_bytes = static_cast<int>(Format<F>::bytes(d.width));
  while (16 << a.row_shift < a.row_bytes) ++a.row_shift;
  const int row_side = static_cast<int>(side_bytes<F>(d.width));
  a.rows = rows_of_a_piece(a.hidden, a.row_bytes, row_side);
  if (a.rows == 0 || (a.row_bytes / 16 & (a.row_bytes / 16 - 1)) != 0) {
    throw ConfigError("slices of width " + std::to_string(d.width) +
                      " cannot be decoded on the GPU; set offload.slice_width to 256, 512 or 1024");
  }
  a.fixed = d.fixed;
  a.fixed_jobs = d.fixed_jobs;
  a.list = d.list;
  a.ready = d.list == nullptr ? nullptr : d.ready;
  a.output_weights = d.output_weights;
  a.experts = d.experts;
  a.hidden_activations = d.hidden_activations;
  a.residual = d.residual;
  a.fixed_sum = d.fixed_sum;
  a.partials = d.partials;
  a.most_jobs = d.fixed_jobs + d.most_list_jobs;
  a.stream.stage_bytes = a.rows * a.row_bytes;
  a.stream.side_bytes = a.rows * row_side * (Format<F>::minimums ? 2 : 1);
  Down host = a;
  host.fixed_jobs = 0;
  host.list = d.host_list;
  host.hidden_activations = d.host_activations;
  host.residual = host.fixed_sum = nullptr;
  if (d.times != nullptr) {
    a.ended = &d.times->device_down;
    host.begun = &d.times->host_down_begun;
    host.ended = &d.times->host_down;
  }
  host.most_jobs = d.most_list_jobs;
  const int most_blocks = a.hidden / a.rows, blocks = std::min(processors(), most_blocks);
  const int host_blocks = d.host_list == nullptr ? 0 : std::min(d.host_blocks, most_blocks);
  int64_t bytes = share_rows<F, B>(a, blocks);
  if (host_blocks > 0) bytes = std::max(bytes, share_rows<F, B>(host, host_blocks));
  launch(down_kernel<F, B>, dim3(host_blocks + blocks), kThreads, bytes, stream, "down", a, host,
         host_blocks);
}

}  // namespace

void decode_gate_up(const DecodeGateUp& gate_up, void* stream) {
  dispatch(gate_up.format, gate_up.tokens, [&](auto format, auto tokens) {
    run_gate_up<decltype(format)::value, decltype(tokens)::value>(gate_up, stream);
  });
}

void decode_down(const DecodeDown& down, void* stream) {
  dispatch(down.format, down.tokens, [&](auto format, auto tokens) {
    run_down<decltype(format)::value, decltype(tokens)::value>(down, stream);
  });
}

}  // namespace lighter::kernels
