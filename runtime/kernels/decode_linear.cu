#include <algorithm>

#include "runtime/kernels/decode_slices.cuh"
#include "runtime/kernels/launch.cuh"

namespace lighter::kernels {
namespace {

struct Linear {
  RowShape row;
  StreamShape stream;
  int rows;
  const std::byte *weights, *scales, *minimums;
  NormedInput normed;
  const float* x;
  const __nv_bfloat16* x_bf16;
  float* out;
  bool add;
  unsigned long long* best;
  bool late_next, idle_before;
  const std::byte* next;
  int64_t next_bytes;
  FirstPairs first_pairs;
};

// The larger value wins, and of equal ones the lower row.
__device__ unsigned long long ranked(float value, int row) {
  const unsigned bits = __float_as_uint(value);
  const unsigned ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(ordered) << 32 | (0xffffffffu - static_cast<unsigned>(row));
}

// One lane of each warp.
__device__ void fetch_first_pairs(const FirstPairs& p, int block, int warp) {
  if (block >= p.blocks) return;
  const Range rows = part_of(p.rows, block, p.blocks);
  const int row = rows.begin + warp;
  if (row >= rows.end) return;
  const auto bytes = static_cast<uint32_t>(p.row_bytes);
  const std::byte* const gate = p.slices + row / p.width * p.slice_bytes + row % p.width * p.row_bytes;
  bulk_prefetch(gate, bytes);
  bulk_prefetch(gate + p.width * p.row_bytes, bytes);
}

template <WeightFormat F, int B, int Columns>
__global__ void __launch_bounds__(kRowWarps<Columns> * 32, 2)
    linear_kernel(const __grid_constant__ Linear a) {
  constexpr int warps = kRowWarps<Columns>;
  extern __shared__ __align__(128) std::byte shared[];
  const int warp = this_warp(), lane = threadIdx.x % 32;
  WarpStream<Format<F>::sides> stream(shared, a.stream, warp, lane);
  std::byte* const x_memory = shared + a.stream.bytes();
  const SharedX x = shared_x<F>(x_memory, a.row.columns, B);
  float* const scratch = reinterpret_cast<float*>(x_memory + x_bytes<F>(a.row.columns, B));

  const int begin = static_cast<int>(static_cast<int64_t>(a.rows) * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(static_cast<int64_t>(a.rows) * (blockIdx.x + 1) / gridDim.x);
  const int64_t row_bytes = static_cast<int64_t>(a.row.segment_bytes) * a.row.segments;
  // The piece to come, of row `ahead`.
  int ahead = begin + warp, ahead_segment = 0;
  const std::byte* ahead_from = a.weights + ahead * row_bytes;
  const auto issue = [&] {
    if (ahead >= end) return;
    const int64_t side = static_cast<int64_t>(ahead) * a.row.side;
    stream.issue(ahead_from, a.row.segment_bytes, ahead_segment == 0, a.scales + side, a.minimums + side,
                 a.row.side);
    ahead_from += a.row.segment_bytes;
    if (++ahead_segment == a.row.segments) {
      ahead_segment = 0;
      ahead += warps;
      ahead_from += (warps - 1) * row_bytes;
    }
  };
  for (int i = 0; i < a.stream.stages; ++i) issue();
  const NormWeights<F, warps> norm(a.normed, a.row.columns);
  const auto fetch_more = [&](int pieces) {
    if (lane != 0) return;
    int row = ahead, segment = ahead_segment;
    for (int i = 0; i < pieces && row < end; ++i) {
      bulk_prefetch(a.weights + row * row_bytes + segment * a.row.segment_bytes, a.row.segment_bytes);
      if (++segment == a.row.segments) {
        segment = 0;
        row += warps;
      }
    }
  };
  constexpr int most_pieces = 16;
  const auto fetch_next = [&] {
    if (lane != 0 || a.next == nullptr) return;
    const int64_t part = blockIdx.x * warps + warp, parts = gridDim.x * warps;
    const int64_t first = a.next_bytes / 16 * part / parts * 16,
                  last = a.next_bytes / 16 * (part + 1) / parts * 16;
    if (first < last) bulk_prefetch(a.next + first, static_cast<uint32_t>(last - first));
  };
  if (a.idle_before) {
    fetch_more(most_pieces);
    fetch_next();
  }
  if (a.first_pairs.slices != nullptr && lane == 0) fetch_first_pairs(a.first_pairs, blockIdx.x, warp);
  if (!a.late_next) allow_next_kernel();
  wait_for_previous_kernel();
  if (!a.idle_before) fetch_more(Format<F>::fetch_more);
  if (a.normed.residual != nullptr) {
    load_normed_x<F, B, warps>(x, a.normed, norm, scratch, a.row.columns, warp, lane);
  } else if (a.x != nullptr) {
    load_x<F>(x, a.x, a.row.columns, B);
  } else {
    const auto* const from = reinterpret_cast<const uint4*>(a.x_bf16);
    for (int i = threadIdx.x; i < B * a.row.columns / 8; i += blockDim.x) {
      reinterpret_cast<uint4*>(x.values)[i] = __ldcg(from + i);
    }
  }
  // What the results are added to: lane i has that of this warp's i-th row from `row` on.
  struct Values {
    float of[B];
    __device__ float& operator[](int b) { return of[b]; }
  };
  const auto before_of = [&](int row) {
    Values values{};
    const int mine = row + lane * warps;
#pragma unroll
    for (int b = 0; b < B; ++b) {
      if (mine < end) values[b] = __ldcg(a.out + static_cast<int64_t>(b) * a.rows + mine);
    }
    return values;
  };
  Values added{};
  if (a.add) added = before_of(begin + warp);
  // Not before: the weights that the next kernel fetches would keep these loads, and the last ones of the
  // kernel before, waiting for microseconds.
  if (a.late_next) allow_next_kernel();
  __syncthreads();

  const NormFactor<B, warps> factor(a.normed, scratch, a.row.columns);
  const RowX<F, B, Columns> row_x(x, lane);
  unsigned long long best = 0;
  for (int row = begin + warp, number = 0; row < end; row += warps, ++number) {
    float* const to = a.out + static_cast<int64_t>(min(lane, B - 1)) * a.rows + row;
    if (a.add && number > 0 && number % 32 == 0) added = before_of(row);
    float before[B];
#pragma unroll
    for (int b = 0; b < B; ++b) before[b] = __shfl_sync(~0u, added[b], number % 32);
    float sum[B];
    dot_row<F, B, Columns>(stream, a.row, row_x, lane, sum, issue);
#pragma unroll
    for (int b = 0; b < B; ++b) {
      if (lane != b) continue;
      const float value = __fmul_rn(sum[b], factor.of[b]);
      *to = before[b] + value;
      best = max(best, ranked(value, row));
    }
  }
  if (!a.idle_before) fetch_next();
  if (a.best != nullptr && lane < B && best != 0) atomicMax(a.best + lane, best);
}

template <WeightFormat F, int B, int Columns>
void run(const DecodeLinear& linear, void* stream) {
  Linear a{};
  a.row = row_shape<F>(linear.columns);
  a.rows = static_cast<int>(linear.rows);
  a.weights = linear.weights;
  a.scales = linear.scales;
  a.minimums = linear.minimums;
  a.normed = linear.normed;
  a.x = linear.x;
  a.x_bf16 = static_cast<const __nv_bfloat16*>(linear.x_bf16);
  a.out = linear.out;
  a.add = linear.add;
  a.best = linear.best;
  a.late_next = linear.late_next;
  a.idle_before = linear.idle_before;
  a.next = linear.next;
  a.next_bytes = linear.next_bytes;
  a.first_pairs = linear.first_pairs;
  const int64_t rest = x_and_scratch_bytes<F, B>(linear.columns);
  constexpr int warps = kRowWarps<Columns>;
  a.stream = row_stream<F>(a.row, warps, rest, linear.after_small ? kSpreadShared : kHalfShared);
  const int64_t least = linear.after_small ? kSpreadShared : 0;
  launch(linear_kernel<F, B, Columns>, dim3(std::min(a.rows, processors())), warps * 32,
         std::max(least, a.stream.bytes() + rest), stream, "linear", a);
}

}  // namespace

std::string why_not_decodable(WeightFormat format, int64_t columns) {
  const int64_t multiple = format == WeightFormat::bf16 ? 128 : format == WeightFormat::int8 ? 1024 : 512;
  if (columns % multiple != 0) {
    return "rows of " + std::to_string(columns) + " values are no multiple of " + std::to_string(multiple);
  }
  if (columns > 16384) return "rows of " + std::to_string(columns) + " values are longer than 16384";
  return {};
}

void decode_linear(const DecodeLinear& linear, void* stream) {
  dispatch_rows(linear.format, linear.tokens, linear.columns, [&](auto format, auto tokens, auto columns) {
    run<decltype(format)::value, decltype(tokens)::value, decltype(columns)::value>(linear, stream);
  });
}

}  // namespace lighter::kernels
