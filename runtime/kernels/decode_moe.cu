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
  int width;
  const std::byte* fixed;
  int fixed_jobs;
  const JobList* list;
  const float* input_weights;
  int experts;
  void* out;
  const unsigned* ready;
};

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
  const NormWeights<F> norm(a.input, a.row.columns);
  if (Format<F>::allow_early) allow_next_kernel();
  wait_for_previous_kernel();
  if (lane == 0) {
    int row = ahead, matrix = ahead_matrix, segment = ahead_segment;
    for (int i = 0; i < Format<F>::fetch_more && row < fixed.end; ++i) {
      bulk_prefetch(a.fixed + row / a.width * layout.bytes() + layout.matrix(matrix) +
                        row % a.width * row_bytes + segment * a.row.segment_bytes,
                    a.row.segment_bytes);
      if (++segment == a.row.segments) {
        segment = 0;
        matrix ^= 1;
        if (matrix == 0) row += kStreamWarps;
      }
    }
  }
  load_normed_x<F, B>(x, a.input, norm, scratch, a.row.columns, warp, lane);
  __syncthreads();
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
          static_cast<float*>(a.out)[to + b * a.width] = value;
        } else {
          static_cast<__nv_bfloat16*>(a.out)[to + b * a.width] = __float2bfloat16_rn(value);
        }
      }
    }
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
  a.fixed = g.fixed;
  a.fixed_jobs = g.fixed_jobs;
  a.list = g.list;
  a.input_weights = g.input_weights;
  a.experts = g.experts;
  a.out = g.out;
  a.stream.side_bytes = a.row.side * (Format<F>::minimums ? 2 : 1);
  const int64_t rest = x_bytes<F>(g.hidden, B) + B * kStreamWarps * 4;
  a.stream.stage_bytes = a.row.segment_bytes;
  a.stream.kept = a.row.segments > 1;
  set_stages(a.stream, rest);
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
  // One block on each multiprocessor leaves the next kernel its place there.
  const int workers = processors() - roles.routing;
  launch(gate_up_kernel<F, B>, dim3(roles.routing + roles.host + workers), kThreads, bytes, stream,
         "gate and up", a, host, roles);
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
  const void* hidden_activations;
  float *residual, *fixed_sum, *partials;
  int most_jobs, most_rows;
  unsigned long long *begun, *ended;  // times to note, or null
};

// Some rows of a slice's down, as a stage has them.
struct DownRows {
  const std::byte *weights, *sides;
  int row_shift;  // a row has 1 << row_shift pieces
  int rows, row_side, columns;
  int valid;  // pieces of a row
};

// Piece `piece` of row `row`, without int4's minimum.
template <WeightFormat F>
__device__ float down_scale(const DownRows& r, int row, int piece) {
  return scale_of<F>(r.sides + row * r.row_side, piece);
}
template <WeightFormat F>
__device__ float down_minimum(const DownRows& r, int row, int piece) {
  return half_of(r.sides + (r.rows + row) * r.row_side, piece / 2);
}

// One warp: the rows' dot products to `to` [rows, B]. Rows of at most 32 pieces, 32 * N pieces in all: a lane
// meets the same piece of x in all its rows.
template <WeightFormat F, int B, int N>
__device__ void down_rows(const DownRows& r, const SharedX& x, int lane, float* to) {
  const int lanes = 1 << r.row_shift, piece = lane & (lanes - 1), row = lane >> r.row_shift,
            step = 32 >> r.row_shift;
  uint4 w[N];
#pragma unroll
  for (int i = 0; i < N; ++i) w[i] = *reinterpret_cast<const uint4*>(r.weights + (i * 32 + lane) * 16);
#pragma unroll
  for (int b = 0; b < B; ++b) {
    const XPiece<F> mine(x, r.columns, b, piece);
    float of_minimum = 0;
    if constexpr (Format<F>::minimums) {
      if (piece % 2 == 0) of_minimum = x.sums[b * (r.columns / 64) + piece / 2];
    }
    float sum[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sum[i] = dot_piece<F>(w[i], mine, down_scale<F>(r, row + i * step, piece), 0.0f);
      if constexpr (Format<F>::minimums) {
        sum[i] = fmaf(down_minimum<F>(r, row + i * step, piece), of_minimum, sum[i]);
      }
      if (piece >= r.valid) sum[i] = 0;
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += __shfl_xor_sync(~0u, sum[i], distance);
    }
    if (piece != 0) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) to[(row + i * step) * B + b] = sum[i];
  }
}

// The same for any rows.
template <WeightFormat F, int B>
__device__ void any_down_rows(const DownRows& r, const SharedX& x, int lane, float* to) {
  const int row_pieces = 1 << r.row_shift, lanes = min(row_pieces, 32);
  float sum[B] = {};
  for (int i = lane; i < r.rows * row_pieces; i += 32) {
    const int row = i >> r.row_shift, piece = i & (row_pieces - 1);
    if (piece < r.valid) {
      const uint4 w = *reinterpret_cast<const uint4*>(r.weights + i * 16);
#pragma unroll
      for (int b = 0; b < B; ++b) {
        sum[b] = dot_piece<F>(w, XPiece<F>(x, r.columns, b, piece), down_scale<F>(r, row, piece), sum[b]);
        if constexpr (Format<F>::minimums) {
          if (piece % 2 == 0) {
            sum[b] = fmaf(down_minimum<F>(r, row, piece), x.sums[b * (r.columns / 64) + piece / 2], sum[b]);
          }
        }
      }
    }
    if (((i - lane + 32) & (row_pieces - 1)) == 0 || row_pieces < 32) {  // the row is complete
#pragma unroll
      for (int b = 0; b < B; ++b) {
        for (int step = lanes / 2; step > 0; step /= 2) sum[b] += __shfl_xor_sync(~0u, sum[b], step);
        if ((lane & (lanes - 1)) == 0) to[row * B + b] = sum[b];
        sum[b] = 0;
      }
    }
  }
}

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
  if (Format<F>::allow_early) allow_next_kernel();
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
  if constexpr (Format<F>::quantized) {
    load_x<F>({x_q, x_scales, x_sums}, static_cast<const float*>(a.hidden_activations), a.width, jobs * B);
  } else {
    for (int i = threadIdx.x; i < jobs * B * values_bytes / 16; i += kThreads) {
      reinterpret_cast<uint4*>(x_q)[i] = __ldcg(static_cast<const uint4*>(a.hidden_activations) + i);
    }
  }
  __syncthreads();

  int job = warp / chunks, chunk = warp % chunks;
  for (; job < jobs; chunk += kStreamWarps) {
    for (; chunk >= chunks; chunk -= chunks) ++job;
    if (job >= jobs) break;
    const int valid = (job == jobs - 1 ? partial_groups : groups) * group / Format<F>::piece_values;
    const SharedX x = {x_q + job * B * values_bytes, x_scales + job * B * groups, x_sums + job * B * groups};
    const std::byte* const weights = stream.wait();
    const DownRows rows = {weights, stream.side(), a.row_shift, a.rows, row_side, a.width, valid};
    float* const to = parts + (job * my_rows + chunk * a.rows) * B;
    const int rounds = a.row_shift > 5 ? 0 : (a.rows << a.row_shift) / 32;
    if (rounds == 5) {
      down_rows<F, B, 5>(rows, x, lane, to);
    } else if (rounds == 4) {
      down_rows<F, B, 4>(rows, x, lane, to);
    } else {
      any_down_rows<F, B>(rows, x, lane, to);
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
      a.residual[at_of(i)] = __fadd_rn(__fadd_rn(a.residual[at_of(i)], fixed), routed);
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

// Needs much for activations; gate and up and qkv, its neighbours, are content with less than half.
constexpr int64_t kDownShared = 120 * 1024;

// Sets what depends on how many blocks there are; returns the shared memory of one.
template <WeightFormat F, int B>
int64_t share_rows(Down& a, int blocks) {
  a.most_rows = (a.hidden / a.rows + blocks - 1) / blocks * a.rows;
  const int64_t rest =
      static_cast<int64_t>(a.most_jobs) * (x_bytes<F>(a.width, B) + a.most_rows * B * 4 + sizeof(SliceJob));
  set_stages(a.stream, rest, kDownShared);
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
