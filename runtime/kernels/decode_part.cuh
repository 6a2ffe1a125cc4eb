// The parts of a decode program as the device sees them, and which weights a warp needs next: of the part at hand,
// then of those behind it.
#pragma once

#include "runtime/kernels/decode.h"
#include "runtime/kernels/decode_attention.h"
#include "runtime/kernels/decode_values.cuh"

namespace lighter::kernels {

constexpr int kSideBlocks = 8;  // that route, and read host memory

// Set to 0 before each launch.
struct PartSync {
  unsigned ready;        // 1: the lists and the experts' weights are there
  unsigned routed;       // side blocks that have scored their experts
  unsigned main, side;   // blocks of either kind at their barrier
  unsigned host_done;    // side blocks that have made their partials
  unsigned cpu_seen;     // 1: the CPU's result is there, or will not come
  unsigned unused[2];
};

struct LinearPart {
  WeightFormat format;
  RowShape row;
  int rows, run_rows;  // run_rows: of a run
  const std::byte *weights, *scales, *minimums;
  NormedInput normed;
  const float* x;
  float* out;
  bool add;
  unsigned long long* best;
};

struct ExpertsPart {
  WeightFormat format;
  // Of a slice, in bytes; matrices: 0 gate, 1 up, 2 down.
  int64_t matrix_bytes, matrix_sides, slice_bytes;
  int kinds;     // of sides: 0, scales, or scales and minima
  RowShape row;  // of gate and up
  int hidden, width, group, run_rows;
  // Of down: a piece is some rows that lie together, a run some pieces of one slice.
  int piece_rows, row_bytes, row_shift, row_side, run_pieces;  // 16 << row_shift is row_bytes
  NormedInput input;
  const std::byte* fixed;
  int fixed_jobs;
  float* values;
  bool down;
  float *residual, *sum;
  const float* fixed_sum;
  bool routes;
  DecodeRouter router;
  int side_blocks, most_list_jobs;
  bool weighs_input;
  float *host_values, *partials;
  const float* from_cpu;
  const unsigned* cpu_done;
  unsigned *late, *error;
  int layer;
  PartSync* sync;

  __device__ int64_t scales_at(int matrix) const { return 3 * matrix_bytes + matrix * matrix_sides; }
  __device__ int64_t minimums_at(int matrix) const { return 3 * matrix_bytes + (3 + matrix) * matrix_sides; }
};

enum class PartKind { linear, attention, experts };

struct Part {
  PartKind kind;
  LinearPart linear;
  DecodeAttention attention;
  ExpertsPart experts;
};

// A block keeps some parts in shared memory: the one at hand and those behind it, which may be fed already.
constexpr int kPartsKept = 4;

struct Range {
  int begin, end;
};

// Part `index` of `of` of a range.
__device__ inline Range part_of(Range range, int index, int of) {
  const unsigned count = range.end - range.begin;
  return {range.begin + static_cast<int>(count * index / of), range.begin + static_cast<int>(count * (index + 1) / of)};
}

__device__ inline unsigned load_acquire(const unsigned* at) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}
__device__ inline void store_release(unsigned* at, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

// Where a warp stands: which of the blocks with the same role its block is.
struct Role {
  bool side;
  int index, of;
};
__device__ inline Role role_in(const ExpertsPart& e) {
  const int block = blockIdx.x, blocks = gridDim.x;
  if (block < e.side_blocks) return {true, block, e.side_blocks};
  return {false, block - e.side_blocks, blocks - e.side_blocks};
}
__device__ inline const JobList* list_of(const ExpertsPart& e, const Role& role) {
  if (!e.routes) return nullptr;
  return role.side ? e.router.zero_copy : e.router.resident;
}

// The warp's rows of a linear part, its pairs of gate and up rows among `pairs`, the block's pieces of down.
__device__ inline Range rows_of(const LinearPart& a, int warp) {
  return part_of(part_of({0, a.rows}, blockIdx.x, gridDim.x), warp, kWarps);
}
__device__ inline Range pairs_of(int pairs, const Role& role, int warp) {
  return part_of(part_of({0, pairs}, role.index, role.of), warp, kWarps);
}
__device__ inline Range pieces_of(const ExpertsPart& e, const Role& role) {
  return part_of({0, e.hidden / e.piece_rows}, role.index, role.of);
}
// Of the pairs from `at` on: how many make a run.
__device__ inline int pairs_of_run(const ExpertsPart& e, int at, int end) {
  return min(e.run_rows, min(end - at, e.width - at % e.width));
}
// A job's runs of down, of `pieces`.
__device__ inline int runs_of_job(const ExpertsPart& e, const Range& pieces) {
  return (pieces.end - pieces.begin + e.run_pieces - 1) / e.run_pieces;
}
__device__ inline Range pieces_of_run(const ExpertsPart& e, const Range& pieces, int run) {
  const int begin = pieces.begin + run * e.run_pieces;
  return {begin, min(pieces.end, begin + e.run_pieces)};
}

// The runs to come of one warp that computes, part after part.
class Feed {
 public:
  __device__ explicit Feed(int warp) : warp_(warp) {}

  // parts: the block's kept ones, of which those before `end` are there. False: there is no more for now, or the routing
  // must be known first.
  __device__ bool next(const Part* parts, int end, WeightRun& run) {
    for (;;) {
      if (part_ >= end) return false;
      const Part& part = parts[part_ % kPartsKept];
      if (part.kind == PartKind::attention) {
        next_part();
      } else if (part.kind == PartKind::linear) {
        if (linear(part.linear, run)) return true;
        next_part();
      } else {
        const int found = experts(part.experts, run);
        if (found > 0) return true;
        if (found < 0) return false;
        next_part();
      }
    }
  }

  // What it looks for.
  __device__ int part() const { return part_; }

 private:
  __device__ void next_part() {
    ++part_;
    phase_ = 0;
    begun_ = false;
  }

  __device__ bool linear(const LinearPart& a, WeightRun& run) {
    if (!begun_) {
      const Range rows = rows_of(a, warp_);
      at_ = rows.begin;
      end_ = rows.end;
      begun_ = true;
    }
    if (at_ >= end_) return false;
    const int rows = min(a.run_rows, end_ - at_);
    run.from = a.weights + static_cast<int64_t>(at_) * a.row.segment_bytes * a.row.segments;
    run.stages = rows * a.row.segments;
    run.stage_bytes = a.row.segment_bytes;
    run.rows = 0;
    const int64_t side = static_cast<int64_t>(at_) * a.row.side;
    run.scales = a.scales == nullptr ? nullptr : a.scales + side;
    run.minimums = a.minimums == nullptr ? nullptr : a.minimums + side;
    run.side_bytes = rows * a.row.side;
    at_ += rows;
    return true;
  }

  // 1: there is a run; 0: there are no more; -1: the routing must be known first.
  __device__ int experts(const ExpertsPart& e, WeightRun& run) {
    for (; phase_ < 3; ++phase_, begun_ = false) {
      if (!begun_ && !begin_phase(e)) return -1;
      if (at_ >= end_) continue;
      if (phase_ < 2) {
        pairs(e, run);
      } else {
        down(e, run);
      }
      return 1;
    }
    return 0;
  }

  __device__ bool begin_phase(const ExpertsPart& e) {
    const Role role = role_in(e);
    if (phase_ == 0) {
      list_ = list_of(e, role);
      side_ = role.side;
      list_jobs_ = list_groups_ = 0;
    }
    if (phase_ == (side_ ? 0 : 1) && list_ != nullptr) {
      if (load_acquire(&e.sync->ready) == 0) return false;
      list_jobs_ = __ldcg(&list_->jobs);
      list_groups_ = __ldcg(&list_->groups);
    }
    Range range{0, 0};
    if (phase_ == 0 && !side_) range = pairs_of(e.fixed_jobs * e.width, role, warp_);
    if (phase_ == 1) range = pairs_of(list_groups_ * e.group, role, warp_);
    if (phase_ < 2) {
      job_ = range.begin / e.width;
      place_ = range.begin % e.width;
    } else if (e.down) {
      pieces_ = pieces_of(e, role);
      runs_ = runs_of_job(e, pieces_);
      range = {warp_, ((side_ ? 0 : e.fixed_jobs) + list_jobs_) * runs_};
      job_ = warp_ / runs_;
      place_ = warp_ % runs_;
    }
    at_ = range.begin;
    end_ = range.end;
    half_ = 0;
    found_ = -1;
    begun_ = true;
    return true;
  }

  // job: among the fixed ones, or in the list.
  __device__ void find_slice(const ExpertsPart& e, int job, bool listed) {
    if (job_ == found_) return;
    found_ = job_;
    slice_ = listed ? reinterpret_cast<const std::byte*>(
                          __ldcg(reinterpret_cast<const unsigned long long*>(&list_->entries[job].slice)))
                    : e.fixed + job * e.slice_bytes;
  }

  __device__ void sides(const ExpertsPart& e, int matrix, int64_t at, int bytes, WeightRun& run) const {
    run.scales = e.kinds > 0 ? slice_ + e.scales_at(matrix) + at : nullptr;
    run.minimums = e.kinds > 1 ? slice_ + e.minimums_at(matrix) + at : nullptr;
    run.side_bytes = bytes;
  }

  // Some gate rows, then the same up rows.
  __device__ void pairs(const ExpertsPart& e, WeightRun& run) {
    find_slice(e, job_, phase_ == 1);
    const int rows = min(e.run_rows, min(end_ - at_, e.width - place_));
    const int row_bytes = e.row.segment_bytes * e.row.segments;
    run.from = slice_ + half_ * e.matrix_bytes + static_cast<int64_t>(place_) * row_bytes;
    run.stages = rows * e.row.segments;
    run.stage_bytes = e.row.segment_bytes;
    run.rows = 0;
    sides(e, half_, static_cast<int64_t>(place_) * e.row.side, rows * e.row.side, run);
    half_ ^= 1;
    if (half_ == 1) return;
    at_ += rows;
    place_ += rows;
    if (place_ == e.width) {
      place_ = 0;
      ++job_;
    }
  }

  __device__ void down(const ExpertsPart& e, WeightRun& run) {
    const Range pieces = pieces_of_run(e, pieces_, place_);
    const bool listed = side_ || job_ >= e.fixed_jobs;
    const int listed_job = side_ ? job_ : job_ - e.fixed_jobs;
    find_slice(e, listed ? listed_job : job_, listed);
    const int64_t row = static_cast<int64_t>(pieces.begin) * e.piece_rows;
    run.from = slice_ + 2 * e.matrix_bytes + row * e.row_bytes;
    run.stages = pieces.end - pieces.begin;
    run.stage_bytes = e.piece_rows * e.row_bytes;
    run.rows = 0;
    sides(e, 2, row * e.row_side, run.stages * e.piece_rows * e.row_side, run);
    const int groups = e.width / e.group, left = list_groups_ - listed_job * groups;
    if (listed && left < groups) {  // the last slice: some of its columns
      run.rows = e.piece_rows;
      run.row_bytes = e.row_bytes / groups * left;
      run.stride = e.row_bytes;
    }
    at_ += kWarps;
    for (place_ += kWarps; place_ >= runs_; place_ -= runs_) ++job_;
  }

  int warp_;
  int part_ = 0, phase_ = 0;  // phases of experts: fixed pairs, listed pairs, down
  bool begun_ = false, side_ = false;
  int at_ = 0, end_ = 0;
  int job_ = 0, place_ = 0, half_ = 0;  // place: row of the slice, or of down's runs of the job
  Range pieces_{0, 0};
  int runs_ = 1;
  const JobList* list_ = nullptr;
  int list_jobs_ = 0, list_groups_ = 0;
  int found_ = -1;  // the job whose slice it is
  const std::byte* slice_ = nullptr;
};

// What a block waits for; see decode_block.cuh.
struct JoinRequest {
  unsigned* at;
  unsigned of;
  int part;
};

// A block's shared memory. Behind it lie the weights' rings, then what a part needs.
struct BlockMemory {
  Part kept[kPartsKept];
  RunQueue queues[kWarps];
  volatile int fed_parts[kWarps];  // which part a warp's feed looks at
  volatile int parts_there;        // kept ones are those before it
  JoinRequest request;
  RingShape shape;
  int rings, scratch;  // where they begin in block_shared()
};

// A warp that computes.
struct Warp {
  int warp, lane;
  WeightRing ring;

  __device__ explicit Warp(BlockMemory& block)
      : warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        ring(RingPlace(block.rings, block.shape, warp), block.queues[warp], lane) {}
};

}  // namespace lighter::kernels
