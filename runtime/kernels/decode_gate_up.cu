// The experts' first half: a block has some consecutive pairs of gate and up rows of the fixed slices and
// some of the list's, a warp takes every kStreamWarps-th.
#include <algorithm>

#include "runtime/kernels/decode_router.cuh"
#include "runtime/kernels/decode_slices.cuh"

namespace lighter::kernels {
namespace {

constexpr int kThreads = kStreamWarps * 32;

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

// One thread.
__device__ void await_arrival(const Arrivals& arrivals, int entry) {
  const unsigned tag = arrival_tag(*static_cast<const volatile unsigned*>(arrivals.step), arrivals.moe_layer,
                                   arrivals.moe_layers);
  wait_for(arrivals.arrived + entry, tag, arrivals.error, arrivals.layer);
  asm volatile("fence.proxy.async.global;" ::: "memory");  // bulk copies read what has come
}

// Paged: not all slices are resident.
template <WeightFormat F, int B, bool Paged>
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
    if (a.lists != nullptr) await<40>(a.lists);
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
      if (Paged && a.arrivals.slots != nullptr) await_arrival(a.arrivals, job);
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
  if (!(Paged && a.routing_first) && lane == 0) fill(false);
  const NormWeights<F> norm(a.input, a.row.columns);
  allow_next_kernel();
  wait_for_previous_kernel();
  if (!Paged && lane == 0) {
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
  if (Paged && threadIdx.x == 0 && a.routing_first) await<40>(a.lists);
  __syncthreads();
  if (Paged && lane == 0 && a.routing_first) fill(true);
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
        weight = __ldcg(a.input_weights + __ldcg(&a.list->entries[job].expert));
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
  DecodeRouter router;
  LayerSignals* signals = nullptr;
  LayerTimes* times = nullptr;
};

template <WeightFormat F, int B, bool Paged>
__global__ void __launch_bounds__(kThreads, 2)
    gate_up_kernel(const __grid_constant__ GateUp a, const __grid_constant__ GateUp host,
                   const __grid_constant__ GateUpRoles roles) {
  extern __shared__ __align__(128) std::byte shared[];
  const int block = blockIdx.x;
  if (block < roles.routing) {
    route(roles.router, shared, &roles.signals->lists, block, roles.routing);
  } else if (Paged && block < roles.routing + roles.host) {
    gate_up_block<F, B, Paged>(host, shared, block - roles.routing, roles.host);
    if (threadIdx.x == 0 && roles.times != nullptr) note_time(&roles.times->host_hidden);
  } else {
    const int before = roles.routing + roles.host;
    gate_up_block<F, B, Paged>(a, shared, block - before, gridDim.x - before);
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
  a.out = g.out;
  const int64_t rest = x_and_scratch_bytes<F, B>(g.hidden);
  a.stream = row_stream<F>(a.row, rest);
  GateUpRoles roles;
  roles.times = g.times;
  if (g.router != nullptr) {
    roles.routing = router_blocks(*g.router);
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
  if (g.host_list != nullptr) roles.host = std::min(g.host_blocks, processors() / 2);
  const int64_t bytes = std::max<int64_t>(a.stream.bytes() + rest, sizeof(RouterScratch));
  // One block on each multiprocessor leaves the next kernel its place there; and beside one that reads host
  // memory another's copies would wait for it.
  const int workers = std::max(1, processors() - roles.routing - roles.host);
  const auto kernel =
      a.routing_first || roles.host > 0 ? gate_up_kernel<F, B, true> : gate_up_kernel<F, B, false>;
  launch(kernel, dim3(roles.routing + roles.host + workers), kThreads, bytes, stream, "gate and up", a, host,
         roles);
}

}  // namespace

void decode_gate_up(const DecodeGateUp& gate_up, void* stream) {
  dispatch(gate_up.format, gate_up.tokens, [&](auto format, auto tokens) {
    run_gate_up<decltype(format)::value, decltype(tokens)::value>(gate_up, stream);
  });
}

}  // namespace lighter::kernels
