// The experts' second half: a block has some output rows of all slices and adds up the slices in their order.
#include <algorithm>

#include "runtime/kernels/decode_slices.cuh"
#include "runtime/kernels/device_clock.cuh"

namespace lighter::kernels {
namespace {

constexpr int kThreads = kStreamWarps * 32;

struct Down {
  StreamShape stream;
  int hidden, width, rows, row_bytes, row_shift;  // rows: of a unit; 16 << row_shift is row_bytes
  const std::byte* fixed;
  int fixed_jobs;
  const JobList* list;
  const LayerSignals* signals;
  // Hidden activations are waited for by the layer's signal, since the kernel that makes them still makes
  // others; else by that kernel's end.
  bool before_its_end;
  const float* output_weights;
  int experts;
  const void* hidden_activations;
  float *residual, *fixed_sum, *partials;
  int most_jobs;
  unsigned long long *begun, *ended;  // times to note, or null
};

// Some rows of a slice's down, as a stage has them.
struct DownRows {
  const std::byte *weights, *sides;
  int row_shift;  // a row has 1 << row_shift pieces
  int rows, row_side, columns;
  int valid;  // pieces of a row
};

// Of piece `piece` of row `row`.
template <WeightFormat F>
__device__ float down_scale(const DownRows& r, int row, unsigned piece) {
  return scale_of<F>(r.sides + row * r.row_side, piece);
}
template <WeightFormat F>
__device__ float down_minimum(const DownRows& r, int row, unsigned piece) {
  return half_of(r.sides + (r.rows + row) * r.row_side, piece / 2);
}

// A lane's part of the sums over lanes of two values: the lanes without `bit` in their number go on with the
// first, the others with the second.
__device__ inline float fold(float first, float second, unsigned bit, unsigned lane) {
  const bool upper = lane & bit;
  return (upper ? second : first) + __shfl_xor_sync(~0u, upper ? first : second, bit);
}
__device__ inline float fold(float value, unsigned bit) {
  return value + __shfl_xor_sync(~0u, value, bit);
}

// The sums of 4 or 5 values over each `Lanes` consecutive lanes: that of values[folded_value(lane)].
template <int Lanes, int N>
__device__ float fold_all(const float (&values)[N], unsigned lane) {
  static_assert((N == 4 || N == 5) && Lanes >= 8);
  constexpr unsigned bit = Lanes / 2;
  float sum =
      fold(fold(values[0], values[1], bit, lane), fold(values[2], values[3], bit, lane), bit / 2, lane);
  if constexpr (N == 5) {
    sum = fold(sum, fold(fold(values[4], bit), bit / 2), bit / 4, lane);
  } else {
    sum = fold(sum, bit / 4);
  }
#pragma unroll
  for (unsigned rest = bit / 8; rest > 0; rest /= 2) sum = fold(sum, rest);
  return sum;
}
template <int Lanes, int N>
__device__ int folded_value(unsigned lane) {
  if (N == 5 && (lane & Lanes / 8)) return 4;
  return (lane & Lanes / 2 ? 1 : 0) + (lane & Lanes / 4 ? 2 : 0);
}

// One warp: the rows' dot products to `to` [rows, B]. Rows of `Lanes` pieces, 32 * N pieces in all: a lane
// meets the same piece of x in all its rows.
template <WeightFormat F, int B, int N, int Lanes>
__device__ void down_rows(const DownRows& r, const SharedX& x, unsigned lane, float* to) {
  constexpr int step = 32 / Lanes;
  const unsigned piece = lane % Lanes, row = lane / Lanes;
  uint4 w[N];
#pragma unroll
  for (int i = 0; i < N; ++i) w[i] = *reinterpret_cast<const uint4*>(r.weights + (i * 32 + lane) * 16);
  const bool valid = static_cast<int>(piece) < r.valid;
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
      if (!valid) sum[i] = 0;
    }
    const float folded = fold_all<Lanes>(sum, lane);
    // Lanes that have the same one write the same.
    to[(row + folded_value<Lanes, N>(lane) * step) * B + b] = folded;
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

// Paged: not all slices are resident.
template <WeightFormat F, int B, bool Paged>
__device__ void down_block(const Down& a, std::byte* shared, int block, int blocks) {
  constexpr int group = Format<F>::group;
  const int warp = this_warp(), lane = threadIdx.x % 32;
  WarpStream<Format<F>::sides> stream(shared, a.stream, warp, lane);
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
      const std::byte* const scales = slice + layout.scales(2) + row * row_side;
      const std::byte* const minimums = slice + layout.minimums(2) + row * row_side;
      if (job == jobs - 1 && partial_groups < groups) {
        const auto bytes = static_cast<uint32_t>(Format<F>::bytes(partial_groups * group));
        stream.issue_rows(from, a.rows, bytes, a.row_bytes, true, scales, minimums, a.rows * row_side);
      } else {
        stream.issue(from, a.rows * a.row_bytes, true, scales, minimums, a.rows * row_side);
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
    fill();
  };
  fill();
  allow_next_kernel();
  const auto all_await = [](const unsigned* signal) {
    if (threadIdx.x == 0) await<100>(signal);
    __syncthreads();
  };
  if (a.signals != nullptr) {  // the list is there long before the hidden activations are
    all_await(&a.signals->lists);
    read_list();
  }
  if (Paged && a.before_its_end) {
    all_await(&a.signals->hidden);
  } else {
    wait_for_previous_kernel();
  }
  if (threadIdx.x == 0) note_time(a.begun);
  if (a.signals == nullptr && a.list != nullptr) read_list();
  if constexpr (Format<F>::quantized) {
    load_x<F>({x_q, x_scales, x_sums}, static_cast<const float*>(a.hidden_activations), a.width, jobs * B);
  } else {
    for (int i = threadIdx.x; i < jobs * B * values_bytes / 16; i += kThreads) {
      reinterpret_cast<uint4*>(x_q)[i] = __ldcg(static_cast<const uint4*>(a.hidden_activations) + i);
    }
  }
  __syncthreads();
  // Of the first of this thread's sums, loaded while they are made.
  const auto at_of = [&](int i) { return static_cast<int64_t>(i % B) * a.hidden + first_row + i / B; };
  const bool sums_here = a.residual != nullptr && static_cast<int>(threadIdx.x) < my_rows * B;
  const float residual_before = sums_here ? __ldcg(a.residual + at_of(threadIdx.x)) : 0;

  int job = warp / chunks, chunk = warp % chunks;
  for (; job < jobs; chunk += kStreamWarps) {
    for (; chunk >= chunks; chunk -= chunks) ++job;
    if (job >= jobs) break;
    const int valid = (job == jobs - 1 ? partial_groups : groups) * group / Format<F>::piece_values;
    const SharedX x = {x_q + job * B * values_bytes, x_scales + job * B * groups, x_sums + job * B * groups};
    const std::byte* const weights = stream.wait();
    const DownRows rows = {weights, stream.side(), a.row_shift, a.rows, row_side, a.width, valid};
    float* const to = parts + (job * my_rows + chunk * a.rows) * B;
    const int rounds = (a.rows << a.row_shift) / 32;
    if (rounds == 5 && a.row_shift == 5) {
      down_rows<F, B, 5, 32>(rows, x, lane, to);
    } else if (rounds == 5 && a.row_shift == 4) {
      down_rows<F, B, 5, 16>(rows, x, lane, to);
    } else if (rounds == 5 && a.row_shift == 3) {
      down_rows<F, B, 5, 8>(rows, x, lane, to);
    } else if (rounds == 4 && a.row_shift == 3) {
      down_rows<F, B, 4, 8>(rows, x, lane, to);
    } else if (rounds == 4 && a.row_shift == 5) {
      down_rows<F, B, 4, 32>(rows, x, lane, to);
    } else if (rounds == 4 && a.row_shift == 4) {
      down_rows<F, B, 4, 16>(rows, x, lane, to);
    } else {
      any_down_rows<F, B>(rows, x, lane, to);
    }
    stream.pass();
    stream.next_side();
    --in_flight;
    fill();
  }
  __syncthreads();

  const int values = my_rows * B, routed_jobs = jobs - a.fixed_jobs;
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
      const float before = i < kThreads ? residual_before : a.residual[at_of(i)];
      a.residual[at_of(i)] = __fadd_rn(__fadd_rn(before, fixed), routed);
    }
    if (a.fixed_sum != nullptr) a.fixed_sum[at_of(i)] = fixed;
  }
  if (threadIdx.x == 0) note_time(a.ended);
}

// The first blocks are for missed slices.
template <WeightFormat F, int B, bool Paged>
__global__ void __launch_bounds__(kThreads, 2)
    down_kernel(const __grid_constant__ Down a, const __grid_constant__ Down host, int host_blocks) {
  extern __shared__ __align__(128) std::byte shared[];
  const int block = blockIdx.x;
  if (Paged && block < host_blocks) {
    down_block<F, B, Paged>(host, shared, block, host_blocks);
  } else {
    down_block<F, B, Paged>(a, shared, block - host_blocks, gridDim.x - host_blocks);
  }
}

// Needs much for activations; gate and up and qkv, its neighbours, are content with less than half.
constexpr int64_t kDownShared = 120 * 1024;

// Shared memory of a block beside its stages, where there are so many blocks.
template <WeightFormat F, int B>
int64_t rest_of(const Down& a, int blocks) {
  const int64_t most_rows = (a.hidden / a.rows + blocks - 1) / blocks * a.rows;
  return static_cast<int64_t>(a.most_jobs) *
         (x_bytes<F>(a.width, B) + most_rows * B * 4 + static_cast<int64_t>(sizeof(SliceJob)));
}

// Sets the stages, which depend on how many blocks there are; returns the shared memory of one.
template <WeightFormat F, int B>
int64_t share_rows(Down& a, int blocks) {
  const int64_t rest = rest_of<F, B>(a, blocks);
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
  a.signals = d.list == nullptr ? nullptr : d.signals;
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
  if (d.host_arrives) host.signals = nullptr;
  a.before_its_end = d.host_list != nullptr && a.signals != nullptr;
  if (d.times != nullptr) {
    a.ended = &d.times->device_down;
    host.begun = &d.times->host_down_begun;
    host.ended = &d.times->host_down;
  }
  host.most_jobs = d.most_list_jobs;
  const int most_blocks = a.hidden / a.rows;
  int host_blocks = d.host_list == nullptr ? 0 : std::min({d.host_blocks, most_blocks, processors() / 2});
  // Of many slices a few blocks could not hold the sums.
  StreamShape two = a.stream;
  two.stages = 2;
  while (host_blocks > 0 && host_blocks * 2 <= std::min(most_blocks, processors() / 2) &&
         two.bytes() + rest_of<F, B>(host, host_blocks) > kMostShared) {
    host_blocks *= 2;
  }
  // All blocks at once: those for missed slices come last to their end.
  const int blocks = std::min(processors() - host_blocks, most_blocks);
  int64_t bytes = share_rows<F, B>(a, blocks);
  if (host_blocks > 0) bytes = std::max(bytes, share_rows<F, B>(host, host_blocks));
  launch(host_blocks > 0 ? down_kernel<F, B, true> : down_kernel<F, B, false>, dim3(host_blocks + blocks),
         kThreads, bytes, stream, "down", a, host, host_blocks);
}

}  // namespace

void decode_down(const DecodeDown& down, void* stream) {
  dispatch(down.format, down.tokens, [&](auto format, auto tokens) {
    run_down<decltype(format)::value, decltype(tokens)::value>(down, stream);
  });
}

}  // namespace lighter::kernels
