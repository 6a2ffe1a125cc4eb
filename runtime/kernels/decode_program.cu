// The launch of a decode program: blocks that stay on their multiprocessors, one on each, and go through the parts
// together.
#include <algorithm>
#include <vector>

#include "runtime/kernels/decode_attention.cuh"
#include "runtime/kernels/decode_experts.cuh"
#include "runtime/kernels/decode_linear.cuh"
#include "runtime/kernels/launch.cuh"

namespace lighter::kernels {
namespace {

static_assert(sizeof(Part) % 16 == 0);
constexpr int kBlockBytes = (static_cast<int>(sizeof(BlockMemory)) + 127) / 128 * 128;

// One warp: a copy of a part that nobody reads yet; there after the next barrier.
__device__ inline void fetch_part(const Part* from, Part* to) {
  for (int i = threadIdx.x % 32; i < static_cast<int>(sizeof(Part) / 16); i += 32) {
    reinterpret_cast<uint4*>(to)[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
  }
}

// One warp: brings closer what the part will read besides weights, and what no part before it makes.
__device__ inline void fetch_ahead_for(const Part& part, int number) {
  const bool mine = blockIdx.x == static_cast<unsigned>(number) * 17 % gridDim.x;
  switch (part.kind) {
    case PartKind::linear:
      if (mine && part.linear.normed.weight != nullptr) {
        fetch_ahead(part.linear.normed.weight, part.linear.row.columns * 2);
      }
      return;
    case PartKind::attention:
      return fetch_keys_ahead(part.attention);
    case PartKind::experts:
      if (mine) fetch_ahead(part.experts.input.weight, part.experts.hidden * 2);
      if (const Role role = role_in(part.experts); role.side) {
        fetch_routing_ahead(part.experts.router, role.index, role.of);
      }
      return;
  }
}

// The joining warp, when part `now` has begun: the part before it gives its place to the next one.
__device__ inline void keep_next_part(BlockMemory& block, const Part* program, int count, int now) {
  const int lane = threadIdx.x % 32, next = now + kPartsKept - 1;
  if (next < count) {
    if (lane < kWarps) {
      while (block.fed_parts[lane] < now) __nanosleep(20);
    }
    __syncwarp();
    fetch_part(program + next, block.kept + next % kPartsKept);
    __threadfence_block();
    __syncwarp();
    if (lane == 0) block.parts_there = next + 1;
  }
  if (now + 1 < count) fetch_ahead_for(block.kept[(now + 1) % kPartsKept], now);
}

__device__ __forceinline__ void run_part(const Part& part, Warp& w, BlockMemory& block) {
  switch (part.kind) {
    case PartKind::linear:
      switch (part.linear.format) {
        case WeightFormat::bf16:
          return run_linear<WeightFormat::bf16>(part.linear, w, block_shared() + block.scratch);
        case WeightFormat::int8:
          return run_linear<WeightFormat::int8>(part.linear, w, block_shared() + block.scratch);
        case WeightFormat::int4:
          return run_linear<WeightFormat::int4>(part.linear, w, block_shared() + block.scratch);
      }
      return;
    case PartKind::attention:
      return run_attention(part.attention, block_shared() + block.scratch);
    case PartKind::experts:
      switch (part.experts.format) {
        case WeightFormat::bf16:
          return run_experts<WeightFormat::bf16>(part.experts, w, block);
        case WeightFormat::int8:
          return run_experts<WeightFormat::int8>(part.experts, w, block);
        case WeightFormat::int4:
          return run_experts<WeightFormat::int4>(part.experts, w, block);
      }
  }
}

__global__ void __launch_bounds__(kBlockThreads, 1)
    program_kernel(const Part* program, int count, unsigned* arrived, RingShape shape) {
  auto& block = *reinterpret_cast<BlockMemory*>(block_shared());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    block.shape = shape;
    block.rings = kBlockBytes;
    block.scratch = kBlockBytes + (shape.bytes() + 127) / 128 * 128;
    block.parts_there = min(count, kPartsKept - 1);
  }
  if (warp < kWarps && lane == 0) {
    RunQueue& queue = block.queues[warp];
    queue.queued = queue.issued = queue.passed = queue.runs_passed = 0;
    block.fed_parts[warp] = 0;
    RingPlace(kBlockBytes, shape, warp).make_barriers();
  }
  if (warp < kPartsKept - 1 && warp < count) fetch_part(program + warp, block.kept + warp);
  __syncthreads();
  if (warp == kFeedingWarp) return feed_rings(block, count);
  if (warp == kFillingWarp) return fill_rings(block, count);
  if (warp == kJoiningWarp) {
    keep_next_part(block, program, count, 0);
    return serve_joining(block, [&](int part) { keep_next_part(block, program, count, part); });
  }
  Warp w(block);
  for (int now = 0; now < count; ++now) {
    if (now > 0) join(block, arrived, now * gridDim.x, now);
    run_part(block.kept[now % kPartsKept], w, block);
  }
  end_joining(block);
}

// Rows that are copied and computed at once: a block should have little more than its share of them, in few
// copies. 0: none will do.
int rows_of_a_piece(int hidden, int row_bytes, int row_side, int blocks) {
  constexpr double copies_cost = 600;  // bytes that could be read meanwhile
  int best = 0;
  double least = 0;
  for (const int rows : {20, 16, 10, 8, 5, 4, 2, 1}) {
    if (hidden % rows != 0 || rows * row_bytes > kStageBytes || rows * row_side % 16 != 0 ||
        rows * row_bytes % 512 != 0) {
      continue;
    }
    const int pieces = (hidden / rows + blocks - 1) / blocks;  // of the block that has most
    const double cost = pieces * (rows * row_bytes + copies_cost);
    if (best == 0 || cost < least) {
      best = rows;
      least = cost;
    }
  }
  return best;
}

// How many rows, of so many bytes of sides each, share a side slot.
int fit_slot(int slot_bytes, int kinds, int side_bytes, int without_sides) {
  return kinds == 0 ? without_sides : std::clamp(slot_bytes / kinds / side_bytes, 1, 32);
}

constexpr int kSlotBytes[] = {0, 640, 1280};  // by the most kinds of sides
constexpr int kRowsWithoutSides = 8;

}  // namespace

struct DecodeProgram::Plan {
  std::vector<Part> parts;
  int most_kinds = 0;
  int64_t memory_bytes = 0;  // of a block, beside the ring
  std::byte* placed = nullptr;
  RingShape shape;

  Part& next(PartKind kind) {
    Part& part = parts.emplace_back();
    part.kind = kind;
    return part;
  }
  void need(int64_t bytes) { memory_bytes = std::max(memory_bytes, bytes); }
  uint64_t sync_at() const { return parts.size() * sizeof(Part); }
  uint64_t sync_bytes() const { return (parts.size() + 1) * sizeof(PartSync); }  // the first is the grid's
};

DecodeProgram::DecodeProgram() : plan_(std::make_unique<Plan>()) {}
DecodeProgram::~DecodeProgram() = default;
DecodeProgram::DecodeProgram(DecodeProgram&&) noexcept = default;
DecodeProgram& DecodeProgram::operator=(DecodeProgram&&) noexcept = default;

uint64_t DecodeProgram::bytes(int parts) {
  return parts * sizeof(Part) + (parts + 1) * sizeof(PartSync);
}

std::string why_not_decodable(WeightFormat format, int64_t columns) {
  const int64_t multiple = format == WeightFormat::bf16 ? 128 : format == WeightFormat::int8 ? 1024 : 512;
  if (columns % multiple != 0) {
    return "rows of " + std::to_string(columns) + " values are no multiple of " + std::to_string(multiple);
  }
  if (columns > 16384) return "rows of " + std::to_string(columns) + " values are longer than 16384";
  return {};
}

void DecodeProgram::add(const DecodeLinear& linear) {
  LinearPart& a = plan_->next(PartKind::linear).linear;
  dispatch(linear.format, [&](auto format) {
    constexpr WeightFormat F = decltype(format)::value;
    a.row = row_shape<F>(linear.columns);
    plan_->need(x_bytes<F>(linear.columns) +
                (linear.normed.residual == nullptr ? 0 : norm_scratch_bytes(linear.columns)));
    plan_->most_kinds = std::max(plan_->most_kinds, Format<F>::kinds);
    a.scales = Format<F>::kinds > 0 ? linear.scales : nullptr;
    a.minimums = Format<F>::kinds > 1 ? linear.minimums : nullptr;
  });
  a.format = linear.format;
  a.rows = static_cast<int>(linear.rows);
  a.weights = linear.weights;
  a.normed = linear.normed;
  a.x = linear.x;
  a.out = linear.out;
  a.add = linear.add;
  a.best = linear.best;
}

void DecodeProgram::add(const DecodeAttention& attention) {
  const int64_t scratch = attention_scratch_bytes(attention.head_dim, attention.heads / attention.kv_heads);
  if (scratch == 0 || attention.kv_heads > std::min(128, processors())) {
    throw ConfigError("attention with " + std::to_string(attention.heads) + " heads, " +
                      std::to_string(attention.kv_heads) + " of them with keys, of " +
                      std::to_string(attention.head_dim) + " values is not supported");
  }
  plan_->need(scratch);
  plan_->next(PartKind::attention).attention = attention;
}

void DecodeProgram::add(const DecodeExperts& experts) {
  ExpertsPart& e = plan_->next(PartKind::experts).experts;
  e.format = experts.format;
  e.hidden = static_cast<int>(experts.hidden);
  e.width = static_cast<int>(experts.width);
  e.input = experts.input;
  e.fixed = experts.fixed;
  e.fixed_jobs = experts.fixed_jobs;
  e.values = experts.values;
  e.down = experts.down;
  e.residual = experts.residual;
  e.sum = experts.sum;
  e.fixed_sum = experts.fixed_sum;
  e.routes = experts.router != nullptr;
  if (e.routes) {
    e.router = *experts.router;
    // Where nothing is missed nobody waits for the routing but the listed slices, behind the fixed ones.
    const bool all_resident = e.router.host_table == nullptr;
    e.side_blocks = all_resident ? std::max(2, (e.router.experts + kMostScored - 1) / kMostScored) : kSideBlocks;
    e.most_list_jobs = experts.most_list_jobs;
    e.weighs_input = experts.weighs_input;
    e.host_values = experts.host_values;
    e.partials = experts.partials;
    e.from_cpu = experts.from_cpu;
    e.cpu_done = experts.cpu_done;
    e.late = experts.late;
    e.error = experts.error;
    e.layer = experts.layer;
  } else {
    e.side_blocks = e.most_list_jobs = 0;
  }
  dispatch(experts.format, [&](auto format) {
    constexpr WeightFormat F = decltype(format)::value;
    const int64_t values = experts.hidden * experts.width;
    e.matrix_bytes = Format<F>::bytes(values);
    e.matrix_sides = side_bytes<F>(values);
    e.kinds = Format<F>::kinds;
    e.slice_bytes = 3 * (e.matrix_bytes + e.kinds * e.matrix_sides);
    e.row = row_shape<F>(experts.hidden);
    e.group = Format<F>::group;
    e.row_bytes = static_cast<int>(Format<F>::bytes(experts.width));
    e.row_side = static_cast<int>(side_bytes<F>(experts.width));
    plan_->most_kinds = std::max(plan_->most_kinds, e.kinds);
    plan_->need(x_bytes<F>(e.hidden) + norm_scratch_bytes(e.hidden));
    if (e.routes) plan_->need(sizeof(RouterScratch));
    if (!e.down) return;
    while (16 << e.row_shift < e.row_bytes) ++e.row_shift;
    const int blocks = processors() - e.side_blocks;
    e.piece_rows = rows_of_a_piece(e.hidden, e.row_bytes, e.row_side, blocks);
    if (e.piece_rows == 0 || 16 << e.row_shift != e.row_bytes) {
      throw ConfigError("slices of width " + std::to_string(experts.width) +
                        " cannot be decoded on the GPU; set offload.slice_width to 256, 512 or 1024");
    }
    const int jobs = e.fixed_jobs + e.most_list_jobs;
    const int rows = (e.hidden / e.piece_rows + blocks - 1) / blocks * e.piece_rows;
    plan_->need(static_cast<int64_t>(e.most_list_jobs) * sizeof(SliceJob) +
                x_bytes<F>(static_cast<int64_t>(jobs) * e.width) + static_cast<int64_t>(jobs) * rows * 4);
  });
}

void DecodeProgram::place(std::byte* memory, void* stream) {
  Plan& plan = *plan_;
  plan.placed = memory;
  plan.shape.slot_bytes = kSlotBytes[plan.most_kinds];
  auto* const sync = reinterpret_cast<PartSync*>(memory + plan.sync_at());
  for (size_t i = 0; i < plan.parts.size(); ++i) {
    LinearPart& linear = plan.parts[i].linear;
    const int kinds = linear.scales == nullptr ? 0 : linear.minimums == nullptr ? 1 : 2;
    linear.run_rows = fit_slot(plan.shape.slot_bytes, kinds, linear.row.side, kRowsWithoutSides);
    ExpertsPart& experts = plan.parts[i].experts;
    experts.run_rows = fit_slot(plan.shape.slot_bytes, experts.kinds, experts.row.side, kRowsWithoutSides);
    experts.run_pieces = fit_slot(plan.shape.slot_bytes, experts.kinds,
                                  std::max(1, experts.piece_rows * experts.row_side), kRowsWithoutSides);
    experts.sync = sync + 1 + i;
  }
  const int64_t all = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const auto bytes_with = [&](int stages) {
    return kBlockBytes + (RingShape{stages, plan.shape.slot_bytes}.bytes() + 127) / 128 * 128 + plan.memory_bytes;
  };
  plan.shape.stages = kMostStages;
  while (plan.shape.stages > 1 && bytes_with(plan.shape.stages) > all) --plan.shape.stages;
  if (plan.shape.stages < 2) {
    throw ConfigError("a decode step needs " + std::to_string(bytes_with(2)) +
                      " bytes of shared memory, more than the " + std::to_string(all) + " there are; set decode: eager");
  }
  plan.memory_bytes = bytes_with(plan.shape.stages);
  check(cudaFuncSetAttribute(program_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(plan.memory_bytes)),
        "the decode program");
  const auto on = static_cast<cudaStream_t>(stream);
  check(cudaMemcpyAsync(memory, plan.parts.data(), plan.sync_at(), cudaMemcpyHostToDevice, on), "the decode program");
  check(cudaStreamSynchronize(on), "the decode program");
}

void DecodeProgram::enqueue(void* stream) const {
  const Plan& plan = *plan_;
  const auto on = static_cast<cudaStream_t>(stream);
  std::byte* const sync = plan.placed + plan.sync_at();
  check(cudaMemsetAsync(sync, 0, plan.sync_bytes(), on), "the decode program");
  cudaLaunchAttribute together{};  // the blocks wait for each other
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(processors());
  config.blockDim = dim3(kBlockThreads);
  config.dynamicSmemBytes = static_cast<size_t>(plan.memory_bytes);
  config.stream = on;
  config.attrs = &together;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, program_kernel, reinterpret_cast<const Part*>(plan.placed),
                           static_cast<int>(plan.parts.size()), reinterpret_cast<unsigned*>(sync), plan.shape),
        "the decode program");
}

uint64_t decode_attention_workspace_bytes(int heads, int, int head_dim) {
  return 128 * sizeof(unsigned) + static_cast<uint64_t>(heads) * kMostSplits * (head_dim + 2) * sizeof(float);
}

}  // namespace lighter::kernels
