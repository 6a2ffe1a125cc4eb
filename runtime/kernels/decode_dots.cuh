// The dot products of a decode step's streamed weights with its activations: within a group of quantized ones
// exact integers, else in fp32. What one thread adds, and in which order, depends on the shapes alone.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>
#include <type_traits>
#include <utility>

#include "runtime/error.h"
#include "runtime/kernels/decode_activations.cuh"

namespace lighter::kernels {

__device__ inline float half_of(const std::byte* halves, unsigned i) {
  return __half2float(reinterpret_cast<const __half*>(halves)[i]);
}

// What one 16-byte piece of weights meets.
template <WeightFormat F>
struct XPiece;
template <>
struct XPiece<WeightFormat::bf16> {
  uint4 v;
  __device__ XPiece(const SharedX& x, int columns, int token, unsigned piece)
      : v(*reinterpret_cast<const uint4*>(x.values + 2 * token * columns + piece * 16)) {}
};
template <>
struct XPiece<WeightFormat::int8> {
  int4 v;
  float scale;
  __device__ XPiece(const SharedX& x, int columns, int token, unsigned piece)
      : v(*reinterpret_cast<const int4*>(x.values + token * columns + piece * 16)),
        scale(x.scales[token * (columns / 128) + piece / 8]) {}
};
template <>
struct XPiece<WeightFormat::int4> {
  int4 low, high;
  float scale;
  __device__ XPiece(const SharedX& x, int columns, int token, unsigned piece)
      : low(*reinterpret_cast<const int4*>(x.values + token * columns + piece * 16)),
        high(*reinterpret_cast<const int4*>(x.values + token * columns + columns / 2 + piece * 16)),
        scale(x.scales[token * (columns / 64) + piece / 2]) {}
};

__device__ inline int dp4a_unsigned(uint32_t a, int b, int sum) {
  asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
  return sum;
}

// sum plus the piece's product, without int4's minimum. scale: of the weights.
template <WeightFormat F>
__device__ float dot_piece(uint4 w, const XPiece<F>& x, float scale, float sum) {
  if constexpr (F == WeightFormat::bf16) {
    const uint32_t ws[4] = {w.x, w.y, w.z, w.w}, vs[4] = {x.v.x, x.v.y, x.v.z, x.v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum = fmaf(__uint_as_float(ws[i] << 16), __uint_as_float(vs[i] << 16), sum);
      sum = fmaf(__uint_as_float(ws[i] & 0xffff0000), __uint_as_float(vs[i] & 0xffff0000), sum);
    }
    return sum;
  } else if constexpr (F == WeightFormat::int8) {
    int dot = __dp4a(static_cast<int>(w.x), x.v.x, 0);
    dot = __dp4a(static_cast<int>(w.y), x.v.y, dot);
    dot = __dp4a(static_cast<int>(w.z), x.v.z, dot);
    dot = __dp4a(static_cast<int>(w.w), x.v.w, dot);
    return fmaf(scale * x.scale, static_cast<float>(dot), sum);
  } else {
    constexpr uint32_t low = 0x0f0f0f0f, high = 0xf0f0f0f0;  // the high ones count 16 times
    int dot = dp4a_unsigned(w.x & low, x.low.x, 0), sixteen = dp4a_unsigned(w.x & high, x.high.x, 0);
    dot = dp4a_unsigned(w.y & low, x.low.y, dot);
    sixteen = dp4a_unsigned(w.y & high, x.high.y, sixteen);
    dot = dp4a_unsigned(w.z & low, x.low.z, dot);
    sixteen = dp4a_unsigned(w.z & high, x.high.z, sixteen);
    dot = dp4a_unsigned(w.w & low, x.low.w, dot);
    sixteen = dp4a_unsigned(w.w & high, x.high.w, sixteen);
    return fmaf(scale * x.scale, static_cast<float>(dot + (sixteen >> 4)), sum);
  }
}

// Scale of a row's piece; scales: the row's.
template <WeightFormat F>
__device__ float scale_of(const std::byte* scales, unsigned piece) {
  if constexpr (F == WeightFormat::bf16) return 1.0f;
  return half_of(scales, F == WeightFormat::int8 ? piece / 8 : piece / 2);
}

// A row in equal pieces of at most kStageBytes.
struct RowShape {
  int columns = 0;
  int segments = 1;
  int segment_bytes = 0;
  int side = 0;  // bytes of a row's scales
};

template <WeightFormat F>
RowShape row_shape(int64_t columns) {
  RowShape row;
  row.columns = static_cast<int>(columns);
  const int64_t bytes = Format<F>::bytes(columns);
  while (bytes / row.segments > kStageBytes || bytes % (16 * row.segments) != 0) ++row.segments;
  row.segment_bytes = static_cast<int>(bytes / row.segments);
  row.side = static_cast<int>(side_bytes<F>(columns));
  return row;
}

// Shared memory of a block that leaves room for the next kernel's blocks on the same multiprocessor. A kernel
// may take more if its neighbours need less.
constexpr int64_t kHalfShared = 110 * 1024;
// Of which no two fit, but one beside a half. A kernel that follows a small one finds whole multiprocessors
// free; with less, some would get two of its blocks and some none, and the kernels after it would inherit
// that.
constexpr int64_t kSpreadShared = 116 * 1024;

constexpr int64_t kMostShared = 226 * 1024;  // of a block

// Sets the stages of a ring beside `rest` bytes of shared memory: as many as fit into `limit`, or, where not
// even two do, two. Throws ConfigError if two are too many.
inline void set_stages(StreamShape& shape, int64_t rest, int64_t limit) {
  for (shape.stages = kMostStages; shape.stages > 1; --shape.stages) {
    if (shape.bytes() + rest <= limit) return;
  }
  shape.stages = 2;
  if (shape.bytes() + rest <= kMostShared) return;
  throw ConfigError("a decode step needs " + std::to_string(rest) +
                    " bytes of shared memory for activations, more than " + std::to_string(kMostShared) +
                    "; set decode: eager");
}

// Shared memory of a kernel's activations, and of the sums that norming them takes.
template <WeightFormat F, int B>
int64_t x_and_scratch_bytes(int64_t columns) {
  return x_bytes<F>(columns, B) + B * kStreamWarps * 4;
}

// The ring of a kernel that reads whole rows, beside `rest` bytes.
template <WeightFormat F>
StreamShape row_stream(const RowShape& row, int warps, int64_t rest, int64_t limit = kHalfShared) {
  StreamShape shape;
  shape.warps = warps;
  shape.stage_bytes = row.segment_bytes;
  shape.side_bytes = row.side * (Format<F>::minimums ? 2 : 1);
  shape.kept = row.segments > 1;
  set_stages(shape, rest, limit);
  return shape;
}

// Calls call(format, tokens) with both as compile-time constants.
template <typename Call>
void dispatch(WeightFormat format, int tokens, const Call& call) {
  const auto with_tokens = [&](auto constant_format) {
    if (tokens == 1) return call(constant_format, std::integral_constant<int, 1>());
    throw ConfigError("a decode step of " + std::to_string(tokens) + " tokens: only 1 is possible");
  };
  switch (format) {
    case WeightFormat::bf16:
      return with_tokens(std::integral_constant<WeightFormat, WeightFormat::bf16>());
    case WeightFormat::int8:
      return with_tokens(std::integral_constant<WeightFormat, WeightFormat::int8>());
    case WeightFormat::int4:
      return with_tokens(std::integral_constant<WeightFormat, WeightFormat::int4>());
  }
}

// sum plus the products of the minima of group `group` and the next one with x's sums of both.
__device__ inline float add_two_minimums(const std::byte* minimums, unsigned group, float2 sums, float sum) {
  const float2 values = __half22float2(*reinterpret_cast<const __half2*>(minimums + group * 2));
  return fmaf(values.x, sums.x, fmaf(values.y, sums.y, sum));
}
template <int B>
__device__ void add_two_minimums(const std::byte* minimums, const SharedX& x, int columns, unsigned group,
                                 float (&sum)[B]) {
#pragma unroll
  for (int b = 0; b < B; ++b) {
    const float2 sums = *reinterpret_cast<const float2*>(x.sums + b * (columns / 64) + group);
    sum[b] = add_two_minimums(minimums, group, sums, sum[b]);
  }
}

// A lane's N pieces of a segment, number lane of each 32 from `first` on, and their groups' minima; without
// branches, so that their loads overlap. scales: the row's.
template <WeightFormat F, int B, int N>
__device__ void dot_pieces(const std::byte* weights, const std::byte* scales, int side, const SharedX& x,
                           int columns, unsigned first, unsigned lane, float (&sum)[B]) {
  uint4 w[N];
#pragma unroll
  for (int i = 0; i < N; ++i) w[i] = *reinterpret_cast<const uint4*>(weights + (i * 32 + lane) * 16);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const unsigned piece = first + i * 32 + lane;
    const float scale = scale_of<F>(scales, piece);
#pragma unroll
    for (int b = 0; b < B; ++b) sum[b] = dot_piece<F>(w[i], XPiece<F>(x, columns, b, piece), scale, sum[b]);
  }
  if constexpr (Format<F>::minimums) {
    constexpr unsigned groups = 16 * N;
#pragma unroll
    for (unsigned from = 0; from < groups; from += 64) {  // a lane has two of these 64
      if (from + lane * 2 >= groups) continue;
      add_two_minimums<B>(scales + side, x, columns, first / 2 + from + lane * 2, sum);
    }
  }
}

// What a row meets. Columns: known when compiled, so that a lane has its pieces of x in registers; or 0.
template <WeightFormat F, int B, int Columns>
struct RowX {
  static_assert(B == 1);
  static constexpr int pieces = Format<F>::bytes(Columns) / 16, lane_pieces = pieces / 32;
  static constexpr int groups = Format<F>::minimums ? Columns / 64 : 0;
  static_assert(pieces % 32 == 0);
  XPiece<F> piece[lane_pieces];
  float2 sums[groups == 0 ? 1 : (groups + 63) / 64];

  __device__ RowX(const SharedX& x, int lane) : RowX(x, lane, std::make_index_sequence<lane_pieces>()) {}

 private:
  template <size_t... I>
  __device__ RowX(const SharedX& x, unsigned lane, std::index_sequence<I...>)
      : piece{XPiece<F>(x, Columns, 0, I * 32 + lane)...} {
    if constexpr (groups > 0) {
#pragma unroll
      for (unsigned from = 0; from < groups; from += 64) {
        const unsigned group = from + lane * 2;
        sums[from / 64] = group < groups ? *reinterpret_cast<const float2*>(x.sums + group) : float2{};
      }
    }
  }
};

template <WeightFormat F, int B>
struct RowX<F, B, 0> {
  const SharedX& x;
  __device__ RowX(const SharedX& shared, int /*lane*/) : x(shared) {}
};

template <WeightFormat F, int B>
__device__ void dot_segment(const std::byte* weights, const std::byte* scales, const RowShape& row,
                            const SharedX& x, unsigned first, unsigned lane, float (&sum)[B]) {
  const unsigned pieces = static_cast<unsigned>(row.segment_bytes) / 16;
  if (pieces == 160) {
    dot_pieces<F, B, 5>(weights, scales, row.side, x, row.columns, first, lane, sum);
  } else if (pieces == 128) {
    dot_pieces<F, B, 4>(weights, scales, row.side, x, row.columns, first, lane, sum);
  } else {
#pragma unroll 1
    for (unsigned i = lane; i < pieces; i += 32) {
      const uint4 w = *reinterpret_cast<const uint4*>(weights + i * 16);
      const float scale = scale_of<F>(scales, first + i);
#pragma unroll
      for (int b = 0; b < B; ++b) {
        sum[b] = dot_piece<F>(w, XPiece<F>(x, row.columns, b, first + i), scale, sum[b]);
      }
      // A group has two pieces, and what a lane has of two groups it adds at the first of their four.
      if (Format<F>::minimums && i % 4 == 0) {
        add_two_minimums<B>(scales + row.side, x, row.columns, (first + i) / 2, sum);
      }
    }
  }
}

// One warp: the row's dot products, complete in every lane. refill: called by all lanes after each segment.
template <WeightFormat F, int B, int Columns, typename Refill>
__device__ void dot_row(WarpStream<Format<F>::sides>& stream, const RowShape& row,
                        const RowX<F, B, Columns>& x, unsigned lane, float (&sum)[B], const Refill& refill) {
#pragma unroll
  for (int b = 0; b < B; ++b) sum[b] = 0;
  if constexpr (Columns == 0) {
    for (int segment = 0; segment < row.segments; ++segment) {
      const std::byte* const weights = stream.wait();
      dot_segment<F, B>(weights, stream.side(), row, x.x, segment * (row.segment_bytes / 16), lane, sum);
      stream.pass();
      refill();
    }
  } else {
    using X = RowX<F, B, Columns>;
    constexpr int segments = (X::pieces * 16 + kStageBytes - 1) / kStageBytes;
    constexpr int lane_pieces = X::lane_pieces / segments;
#pragma unroll
    for (int segment = 0; segment < segments; ++segment) {
      const std::byte* const weights = stream.wait();
      const std::byte* const scales = stream.side();
      uint4 w[lane_pieces];
#pragma unroll
      for (int i = 0; i < lane_pieces; ++i) {
        w[i] = *reinterpret_cast<const uint4*>(weights + (i * 32 + lane) * 16);
      }
#pragma unroll
      for (int i = 0; i < lane_pieces; ++i) {
        const int number = segment * lane_pieces + i;
        sum[0] = dot_piece<F>(w[i], x.piece[number], scale_of<F>(scales, number * 32 + lane), sum[0]);
      }
      if constexpr (Format<F>::minimums) {
        static_assert(segments == 1);
#pragma unroll
        for (unsigned from = 0; from < X::groups; from += 64) {
          const unsigned group = from + lane * 2;
          if (group >= X::groups) continue;
          sum[0] = add_two_minimums(scales + X::groups * 2, group, x.sums[from / 64], sum[0]);
        }
      }
      stream.pass();
      refill();
    }
  }
  stream.next_side();
#pragma unroll
  for (int b = 0; b < B; ++b) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum[b] += __shfl_xor_sync(~0u, sum[b], step);
  }
}

// Where x is in registers there are few warps.
template <int Columns>
constexpr int kRowWarps = Columns == 0 ? kStreamWarps : kFewStreamWarps;

// The same for what reads whole rows: with their columns, too, as a constant where a kernel is made for so
// many, else 0.
template <typename Call>
void dispatch_rows(WeightFormat format, int tokens, int64_t columns, const Call& call) {
  dispatch(format, tokens, [&](auto constant_format, auto constant_tokens) {
    const auto with_columns = [&](auto constant) { call(constant_format, constant_tokens, constant); };
    if constexpr (Format<decltype(constant_format)::value>::quantized) {
      if (columns == 5120) return with_columns(std::integral_constant<int, 5120>());
      if (columns == 4096) return with_columns(std::integral_constant<int, 4096>());
    }
    with_columns(std::integral_constant<int, 0>());
  });
}

}  // namespace lighter::kernels
