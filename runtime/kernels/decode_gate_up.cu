// The experts' first half: a block has some consecutive pairs of gate and up rows of the fixed slices and
// some of the list's, a warp takes every kRowWarps-th.
#include <algorithm>

#include "runtime/kernels/decode_router.cuh"
#include "runtime/kernels/decode_slices.cuh"

namespace lighter::kernels {
namespace {

struct GateUp {
  RowShape row;
  StreamShape stream;
  NormedInput input;
  int width;
  const std::byte* fixed;
  int fixed_jobs;
  const JobList* list;
  const float* input_weights;
  void* out;
  const unsigned* lists;  // 1: the list is there; null: it is anyway
  LayerSignals* signals;  // told when this is done, or null
  Arrivals arrivals;      // of the list's slices; without slots they are there
  bool routing_first;  // no weights are fetched before the routing is done, whose loads would wait for them
};

// One warp.
__device__ void await_arrival(const Arrivals& arrivals, int entry, int lane) {
  if (lane == 0) {
    const unsigned tag = arrival_tag(*static_cast<const volatile unsigned*>(arrivals.step),
                                     arrivals.moe_layer, arrivals.moe_layers);
    wait_for(arrivals.arrived + entry, tag, arrivals.error, arrivals.layer);
  }
  __syncwarp();
  asm volatile("fence.proxy.async.global;" ::: "memory");  // bulk copies read what has come
}

// Paged: not all slices are resident.
template <WeightFormat F, int B, int Columns, bool Paged>
__device__ void gate_up_block(const GateUp& a, std::byte* shared, int block, int blocks) {
  constexpr int group = Format<F>::group, warps = kRowWarps<Columns>;
  const int warp = this_warp(), lane = threadIdx.x % 32;
  WarpStream<Format<F>::sides> stream(shared, a.stream, warp, lane);
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
    if (a.lists != nullptr && lane == 0) await<40>(a.lists);
    __syncwarp();
    listed = part_of(__ldcg(&a.list->groups) * group, block, blocks);
  };

  // The piece to come. It is in the fixed slices first, then in the list's.
  SliceRow ahead(fixed.begin + warp, a.width);
  int ahead_matrix = 0, ahead_segment = 0, ahead_slice_job = -1, in_flight = 0;
  bool ahead_in_list = false;
  const std::byte* ahead_slice = nullptr;
  const auto issue = [&](bool may_wait) {
    if (!ahead_in_list && ahead.row >= fixed.end) {
      if (!may_wait) return false;
      await_list();
      ahead_in_list = true;
      ahead = SliceRow(listed.begin + warp, a.width);
      ahead_slice_job = -1;
    }
    if (ahead_in_list && ahead.row >= listed.end) return false;
    if (ahead.job != ahead_slice_job) {
      if (Paged && a.arrivals.slots != nullptr) await_arrival(a.arrivals, ahead.job, lane);
      ahead_slice =
          ahead_in_list ? slice_at(a.list->entries[ahead.job]) : a.fixed + ahead.job * layout.bytes();
      ahead_slice_job = ahead.job;
    }
    const std::byte* const from = ahead_slice + layout.matrix(ahead_matrix) + ahead.in_job * row_bytes +
                                  ahead_segment * a.row.segment_bytes;
    const int64_t side = static_cast<int64_t>(ahead.in_job) * a.row.side;
    stream.issue(from, a.row.segment_bytes, ahead_segment == 0,
                 ahead_slice + layout.scales(ahead_matrix) + side,
                 ahead_slice + layout.minimums(ahead_matrix) + side, a.row.side);
    ++in_flight;
    if (++ahead_segment == a.row.segments) {
      ahead_segment = 0;
      ahead_matrix ^= 1;
      if (ahead_matrix == 0) ahead.next(warps, a.width);
    }
    return true;
  };
  const auto fill = [&](bool may_wait) {
    while (in_flight < a.stream.stages && issue(may_wait)) {
    }
  };
  if (!(Paged && a.routing_first)) fill(false);
  const NormWeights<F, warps> norm(a.input, a.row.columns);
  allow_next_kernel();
  wait_for_previous_kernel();
  if (!Paged && lane == 0) {
    int row = ahead.row, matrix = ahead_matrix, segment = ahead_segment;
    for (int i = 0; i < Format<F>::fetch_more && row < fixed.end; ++i) {
      bulk_prefetch(a.fixed + row / a.width * layout.bytes() + layout.matrix(matrix) +
                        row % a.width * row_bytes + segment * a.row.segment_bytes,
                    a.row.segment_bytes);
      if (++segment == a.row.segments) {
        segment = 0;
        matrix ^= 1;
        if (matrix == 0) row += warps;
      }
    }
  }
  load_normed_x<F, B, warps>(x, a.input, norm, scratch, a.row.columns, warp, lane);
  if (Paged && threadIdx.x == 0 && a.routing_first) await<40>(a.lists);
  __syncthreads();
  if (Paged && a.routing_first) fill(true);
  const auto refill = [&] {
    --in_flight;
    fill(true);
  };

  const NormFactor<B, warps> factor(a.input, scratch, a.row.columns);
  const RowX<F, B, Columns> row_x(x, lane);
  int weight_job = -1;
  float weight = 1;
  for (int part = 0; part < 2; ++part) {
    if (part == 1) {
      await_list();
      fill(true);
    }
    const Range pairs = part == 0 ? fixed : listed;
    for (SliceRow pair(pairs.begin + warp, a.width); pair.row < pairs.end; pair.next(warps, a.width)) {
      const int job = pair.job;
      if (part == 1 && a.input_weights != nullptr && job != weight_job) {
        weight_job = job;
        weight = __ldcg(a.input_weights + __ldcg(&a.list->entries[job].expert));
      }
      float gate[B], up[B];
      dot_row<F, B, Columns>(stream, a.row, row_x, lane, gate, refill);
      dot_row<F, B, Columns>(stream, a.row, row_x, lane, up, refill);
      const int64_t to =
          static_cast<int64_t>(part == 0 ? job : a.fixed_jobs + job) * B * a.width + pair.in_job;
#pragma unroll
      for (int b = 0; b < B; ++b) {
        if (lane != b) continue;
        const float scale = weight * factor.of[b], g = gate[b] * scale;
        const float value = __fdividef(g, 1.0f + __expf(-g)) * (up[b] * scale);
        if constexpr (Format<F>::quantized) {
          static_cast<float*>(a.out)[to + b * a.width] = value;
        } else {
          static_cast<__nv_bfloat16*>(a.out)[to + b * a.width] = __float2bfloat16_rn(value);
        }
      }
    }
  }
  if (!Paged || a.signals == nullptr) return;
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();  // for the whole block, whose writes the barrier has put before it
  if (atomicAdd(&a.signals->blocks, 1) + 1 == static_cast<unsigned>(blocks)) {
    __threadfence();
    store_release(&a.signals->hidden, 1);
  }
}

// Blocks in this order: `routing` of the router, then `host.blocks` for missed slices, then those of `a`,
// which begin with the fixed slices, for which routing does not matter.
struct GateUpRoles {
  int routing = 0, host = 0;
  int guessing = 0;  // of the routing blocks, the last
  DecodeRouter router;
  LayerSignals* signals = nullptr;
  LayerTimes* times = nullptr;
};

template <WeightFormat F, int B, int Columns, bool Paged>
__global__ void __launch_bounds__(kRowWarps<Columns> * 32, 2)
    gate_up_kernel(const __grid_constant__ GateUp a, const __grid_constant__ GateUp host,
                   const __grid_constant__ GateUpRoles roles) {
  extern __shared__ __align__(128) std::byte shared[];
  const int block = blockIdx.x;
  if (block < roles.routing - roles.guessing) {
    route<kRowWarps<Columns>>(roles.router, shared, &roles.signals->lists, block);
  } else if (Paged && block < roles.routing) {
    guess_next<kRowWarps<Columns>>(roles.router, shared);
  } else if (Paged && block < roles.routing + roles.host) {
    gate_up_block<F, B, Columns, Paged>(host, shared, block - roles.routing, roles.host);
    if (threadIdx.x == 0 && roles.times != nullptr) note_time(&roles.times->host_hidden);
  } else {
    const int before = roles.routing + roles.host;
    gate_up_block<F, B, Columns, Paged>(a, shared, block - before, gridDim.x - before);
    if (threadIdx.x == 0 && roles.times != nullptr) note_time(&roles.times->device_hidden);
  }
}

int guessing_blocks_of(const DecodeGateUp& g) {
  return g.router != nullptr && g.router->host_table != nullptr && g.router->guess.weight != nullptr ? 1 : 0;
}
int routing_blocks_of(const DecodeGateUp& g) {
  return g.router == nullptr ? 0 : router_blocks(*g.router) + guessing_blocks_of(g);
}
int host_blocks_of(const DecodeGateUp& g) {
  return g.host_list == nullptr ? 0 : std::min(g.host_blocks, processors() / 2);
}
// One block on each multiprocessor leaves the next kernel its place there; and beside one that reads host
// memory another's copies would wait for it.
int workers_of(const DecodeGateUp& g) {
  return std::max(1, processors() - routing_blocks_of(g) - host_blocks_of(g));
}

template <WeightFormat F, int B, int Columns>
void run_gate_up(const DecodeGateUp& g, void* stream) {
  GateUp a{};
  a.row = row_shape<F>(g.hidden);
  a.input = g.input;
  a.width = static_cast<int>(g.width);
  a.fixed = g.fixed;
  a.fixed_jobs = g.fixed_jobs;
  a.list = g.list;
  a.input_weights = g.input_weights;
  a.out = g.out;
  const int64_t rest = x_and_scratch_bytes<F, B>(g.hidden);
  a.stream = row_stream<F>(a.row, kRowWarps<Columns>, rest);
  GateUpRoles roles;
  roles.times = g.times;
  if (g.router != nullptr) {
    roles.routing = routing_blocks_of(g);
    roles.guessing = guessing_blocks_of(g);
    roles.router = *g.router;
    roles.signals = g.signals;
    a.lists = &g.signals->lists;
  }
  GateUp host = a;
  a.routing_first = g.router != nullptr && g.router->host_table != nullptr;
  if (g.host_list != nullptr) a.signals = g.signals;
  host.fixed_jobs = 0;
  host.arrivals = g.arrivals;
  host.list = g.host_list;
  host.out = g.host_out;
  roles.host = host_blocks_of(g);
  const int64_t bytes =
      std::max(a.stream.bytes() + rest, g.router == nullptr ? 0 : RouterRoom::bytes(*g.router));
  const int workers = workers_of(g);
  const bool paged = a.routing_first || roles.host > 0;
  launch(paged ? gate_up_kernel<F, B, Columns, true> : gate_up_kernel<F, B, Columns, false>,
         dim3(roles.routing + roles.host + workers), kRowWarps<Columns> * 32, bytes, stream, "gate and up", a,
         host, roles);
}

}  // namespace

FirstPairs first_pairs(const DecodeGateUp& g) {
  FirstPairs pairs;
  dispatch(g.format, g.tokens, [&](auto format, auto) {
    constexpr WeightFormat known = decltype(format)::value;
    pairs.slice_bytes = SliceLayout<known>(g.hidden, g.width).bytes();
    pairs.row_bytes = Format<known>::bytes(g.hidden);
  });
  pairs.slices = g.fixed;
  pairs.width = static_cast<int>(g.width);
  pairs.rows = g.fixed_jobs * pairs.width;
  pairs.blocks = workers_of(g);
  return pairs;
}

void decode_gate_up(const DecodeGateUp& gate_up, void* stream) {
  dispatch_rows(gate_up.format, gate_up.tokens, gate_up.hidden, [&](auto format, auto tokens, auto columns) {
    run_gate_up<decltype(format)::value, decltype(tokens)::value, decltype(columns)::value>(gate_up, stream);
  });
}

}  // namespace lighter::kernels
