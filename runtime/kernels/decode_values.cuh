// Activations of a decode step in shared memory, and the dot products of streamed weights with them.
//
// int8 and int4 weights meet activations quantized to int8 (runtime/quant/activations.h has the same rule: a
// scale a group, max|x| / 127, q = rint(x / scale)); dots within a group are exact integers. bf16 weights
// meet bf16 activations in fp32. What one thread adds, and in which order, depends on the shapes alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "runtime/error.h"
#include "runtime/kernels/decode.h"
#include "runtime/kernels/weight_ring.cuh"

namespace lighter::kernels {

template <WeightFormat F>
struct Format;
template <>
struct Format<WeightFormat::bf16> {
  static constexpr int x_value_bytes = 2;
  static constexpr int group = 64, piece_values = 8;  // a group only divides work here
  static constexpr bool quantized = false, minimums = false;
  static constexpr int kinds = 0;  // of sides
  __host__ __device__ static constexpr int64_t bytes(int64_t values) { return 2 * values; }
};
template <>
struct Format<WeightFormat::int8> {
  static constexpr int x_value_bytes = 1;
  static constexpr int group = 128, piece_values = 16;
  static constexpr bool quantized = true, minimums = false;
  static constexpr int kinds = 1;
  __host__ __device__ static constexpr int64_t bytes(int64_t values) { return values; }
};
template <>
struct Format<WeightFormat::int4> {
  static constexpr int x_value_bytes = 1;
  static constexpr int group = 64, piece_values = 32;
  static constexpr bool quantized = true, minimums = true;
  static constexpr int kinds = 2;
  __host__ __device__ static constexpr int64_t bytes(int64_t values) { return values / 2; }
};

// Of one kind (scales or minima) for this many values.
template <WeightFormat F>
__host__ __device__ constexpr int64_t side_bytes(int64_t values) {
  return Format<F>::quantized ? values / Format<F>::group * 2 : 0;
}

// Some vectors of `columns` values each: bf16, or int8. For int4 weights a vector's int8 lie in two planes, each
// group's first and second half, since a byte of weights holds one value of each.
struct SharedX {
  std::byte* values;
  float* scales;  // [vectors, columns / group]
  float* sums;    // likewise; int4: scale * sum of the group's q

  // The vectors from `vector` on.
  template <WeightFormat F>
  __device__ SharedX from(int vector, int columns) const {
    const int groups = vector * (columns / Format<F>::group);
    return {values + Format<F>::x_value_bytes * vector * columns, scales + groups, sums + groups};
  }
};

template <WeightFormat F>
__host__ __device__ int64_t x_bytes(int64_t values) {
  if (!Format<F>::quantized) return 2 * values;
  return values + values / Format<F>::group * 4 * (Format<F>::minimums ? 2 : 1);
}

template <WeightFormat F>
__device__ SharedX shared_x(std::byte* memory, int values) {
  auto* const scales = reinterpret_cast<float*>(memory + values);
  return {memory, scales, scales + values / Format<F>::group};
}

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

__device__ inline float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// a / b, rounded correctly, for normal b: what the library's division does, without its way out for the other cases,
// which is a call and costs registers. inverse: of b.
__device__ inline float divide(float a, float b, float inverse) {
  const float quotient = a * inverse;
  return fmaf(fmaf(-quotient, b, a), inverse, quotient);
}
__device__ inline float inverse_of(float b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return fmaf(fmaf(-b, inverse, 1.0f), inverse, inverse);
}

// Lanes of one group hold 4 consecutive values each. Returns them as 4 int8; the first lane of the group gets
// right scale and sum.
template <int Group>
__device__ uint32_t quantize4(float4 v, int lane, float& scale, float& sum) {
  constexpr int lanes = Group / 4;
  constexpr float least = 1e-30f;  // smaller groups are zeros
  float most = max_nan(max_nan(fabsf(v.x), fabsf(v.y)), max_nan(fabsf(v.z), fabsf(v.w)));
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) most = max_nan(most, __shfl_xor_sync(~0u, most, step));
  scale = divide(most, 127.0f, 1.0f / 127.0f);
  const float inverse = inverse_of(scale);
  const float values[4] = {v.x, v.y, v.z, v.w};
  uint32_t packed = 0;
  int total = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int q = scale < least ? 0 : max(-127, min(127, __float2int_rn(divide(values[i], scale, inverse))));
    packed |= (static_cast<uint32_t>(q) & 0xff) << (8 * i);
    total += q;
  }
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
  sum = __fmul_rn(scale, static_cast<float>(total));
  return packed;
}

// Where value v of a token lies among its int8.
template <WeightFormat F>
__device__ int place_of(int v, int columns) {
  if (F != WeightFormat::int4) return v;
  const int in_group = v % 64;
  return in_group / 32 * (columns / 2) + v / 64 * 32 + in_group % 32;
}

// One warp: 128 consecutive values from `first` on, 4 a lane.
template <WeightFormat F>
__device__ __forceinline__ void put_x(const SharedX& x, int columns, int vector, int first, float4 v, int lane) {
  if constexpr (F == WeightFormat::bf16) {
    auto* const to = reinterpret_cast<__nv_bfloat162*>(x.values) + (vector * columns + first) / 2 + lane * 2;
    to[0] = __floats2bfloat162_rn(v.x, v.y);
    to[1] = __floats2bfloat162_rn(v.z, v.w);
  } else {
    constexpr int group = Format<F>::group, lanes = group / 4;
    float scale, sum;
    const uint32_t q = quantize4<group>(v, lane, scale, sum);
    const int value = first + lane * 4;
    *reinterpret_cast<uint32_t*>(x.values + vector * columns + place_of<F>(value, columns)) = q;
    if (lane % lanes == 0) {
      const int at = vector * (columns / group) + value / group;
      x.scales[at] = scale;
      if constexpr (Format<F>::minimums) x.sums[at] = sum;
    }
  }
}

// The barrier of a block's warps that compute.
__device__ inline void sync_workers() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

constexpr int kChunks = 5;  // of 128 values, that a warp reads at once: a read takes far longer than what is done then

// Whole block: `vectors` of `columns` values each, a multiple of 128. Ends with a barrier.
template <WeightFormat F>
__device__ __forceinline__ void load_x(const SharedX& x, const float* from, int vectors, int columns, int warp,
                                       int lane) {
  const int of_vector = columns / 128, chunks = vectors * of_vector;
#pragma unroll 1
  for (int first = warp; first < chunks; first += kChunks * kWarps) {
    float4 v[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      v[i] = __ldcg(reinterpret_cast<const float4*>(from) + min(first + i * kWarps, chunks - 1) * 32 + lane);
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = first + i * kWarps;
      if (chunk < chunks) put_x<F>(x, columns, chunk / of_vector, chunk % of_vector * 128, v[i], lane);
    }
  }
  sync_workers();
}

// Beside x, for load_normed_x: the values before their norm, and each warp's sum of squares.
inline int64_t norm_scratch_bytes(int64_t columns) {
  return columns * 4 + kWarps * 4;
}

// The same of the normed residual: x * rsqrt(mean(x^2) + eps) * weight, in fp32; columns at most 8192. scratch:
// norm_scratch_bytes() at a multiple of 16. Ends with a barrier.
template <WeightFormat F>
__device__ __forceinline__ void load_normed_x(const SharedX& x, const NormedInput& input, std::byte* scratch,
                                              int columns, int warp, int lane) {
  static_assert(kChunks * kWarps >= 8192 / 128);
  const int chunks = columns / 128;
  const auto* const from = reinterpret_cast<const float4*>(input.residual);
  const auto* const weights = reinterpret_cast<const uint2*>(input.weight);
  auto* const weighed = reinterpret_cast<float4*>(scratch);
  float* const sums = reinterpret_cast<float*>(weighed + columns / 4);
  float4 v[kChunks];
  uint2 w[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int at = min(warp + i * kWarps, chunks - 1) * 32 + lane;
    v[i] = __ldcg(from + at);
    w[i] = __ldg(weights + at);
  }
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int chunk = warp + i * kWarps;
    if (chunk >= chunks) break;
    squares += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
    v[i].x *= __uint_as_float(w[i].x << 16);
    v[i].y *= __uint_as_float(w[i].x & 0xffff0000);
    v[i].z *= __uint_as_float(w[i].y << 16);
    v[i].w *= __uint_as_float(w[i].y & 0xffff0000);
    weighed[chunk * 32 + lane] = v[i];
  }
  squares = warp_sum(squares);
  if (lane == 0) sums[warp] = squares;
  sync_workers();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += sums[i];
  const float unit = rsqrtf(sum / static_cast<float>(columns) + input.eps);
  // The multiprocessor's instruction cache is small, too: one copy of this is enough.
#pragma unroll 1
  for (int chunk = warp; chunk < chunks; chunk += kWarps) {
    float4 scaled = weighed[chunk * 32 + lane];
    scaled.x *= unit;
    scaled.y *= unit;
    scaled.z *= unit;
    scaled.w *= unit;
    put_x<F>(x, columns, 0, chunk * 128, scaled, lane);
  }
  sync_workers();
}

__device__ inline float half_of(const std::byte* halves, int i) {
  return __half2float(reinterpret_cast<const __half*>(halves)[i]);
}

// One 16-byte piece of weights, the number `piece` + 32 * turn of its row, with the same piece of x. scales, minimums:
// the row's.
template <WeightFormat F>
__device__ __forceinline__ float dot_piece(uint4 w, const std::byte* scales, const std::byte* minimums,
                                           const SharedX& x, int columns, unsigned piece, unsigned turn, float sum) {
  const std::byte* const at = x.values + piece * 16 + turn * 512;
  if constexpr (F == WeightFormat::bf16) {
    const uint32_t ws[4] = {w.x, w.y, w.z, w.w};
    const uint4 v = *reinterpret_cast<const uint4*>(at);
    const uint32_t vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum = fmaf(__uint_as_float(ws[i] << 16), __uint_as_float(vs[i] << 16), sum);
      sum = fmaf(__uint_as_float(ws[i] & 0xffff0000), __uint_as_float(vs[i] & 0xffff0000), sum);
    }
    return sum;
  } else if constexpr (F == WeightFormat::int8) {
    const unsigned group = piece / 8 + turn * 4;
    const float scale = half_of(scales, group) * x.scales[group];
    const int4 v = *reinterpret_cast<const int4*>(at);
    int dot = __dp4a(static_cast<int>(w.x), v.x, 0);
    dot = __dp4a(static_cast<int>(w.y), v.y, dot);
    dot = __dp4a(static_cast<int>(w.z), v.z, dot);
    dot = __dp4a(static_cast<int>(w.w), v.w, dot);
    return fmaf(scale, static_cast<float>(dot), sum);
  } else {
    const unsigned group = piece / 2 + turn * 16;
    const float scale = half_of(scales, group) * x.scales[group];
    const float minimum = piece % 2 == 0 ? half_of(minimums, group) : 0.0f;
    constexpr uint32_t low = 0x0f0f0f0f;
    const int4 v = *reinterpret_cast<const int4*>(at);
    const int4 u = *reinterpret_cast<const int4*>(at + columns / 2);
    int dot = __dp4a(static_cast<int>(w.x & low), v.x, 0);
    int other = __dp4a(static_cast<int>(w.x >> 4 & low), u.x, 0);
    dot = __dp4a(static_cast<int>(w.y & low), v.y, dot);
    other = __dp4a(static_cast<int>(w.y >> 4 & low), u.y, other);
    dot = __dp4a(static_cast<int>(w.z & low), v.z, dot);
    other = __dp4a(static_cast<int>(w.z >> 4 & low), u.z, other);
    dot = __dp4a(static_cast<int>(w.w & low), v.w, dot);
    other = __dp4a(static_cast<int>(w.w >> 4 & low), u.w, other);
    sum = fmaf(scale, static_cast<float>(dot + other), sum);
    return fmaf(minimum, x.sums[group], sum);
  }
}

// `turns` pieces a lane, from piece `first` of the row on.
template <WeightFormat F, int turns>
__device__ __forceinline__ float dot_pieces(const std::byte* weights, const std::byte* scales,
                                            const std::byte* minimums, const SharedX& x, int columns, unsigned first,
                                            int lane, float sum) {
  uint4 w[turns];
#pragma unroll
  for (int i = 0; i < turns; ++i) w[i] = *reinterpret_cast<const uint4*>(weights + lane * 16 + i * 512);
#pragma unroll
  for (int i = 0; i < turns; ++i) {
    sum = dot_piece<F>(w[i], scales, minimums, x, columns, first + lane, i, sum);
  }
  return sum;
}

// A stage of `pieces` pieces, the common sizes without a branch for each piece.
template <WeightFormat F>
__device__ __forceinline__ float dot_stage(const std::byte* weights, int pieces, const std::byte* scales,
                                           const std::byte* minimums, const SharedX& x, int columns, unsigned first,
                                           int lane, float sum) {
  if (pieces == 160) return dot_pieces<F, 5>(weights, scales, minimums, x, columns, first, lane, sum);
  if (pieces == 128) return dot_pieces<F, 4>(weights, scales, minimums, x, columns, first, lane, sum);
  for (int i = lane; i < pieces; i += 32) {
    sum = dot_piece<F>(*reinterpret_cast<const uint4*>(weights + i * 16), scales, minimums, x, columns, first + i, 0,
                       sum);
  }
  return sum;
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

// Calls call(format) with it as a compile-time constant.
template <typename Call>
void dispatch(WeightFormat format, const Call& call) {
  switch (format) {
    case WeightFormat::bf16:
      return call(std::integral_constant<WeightFormat, WeightFormat::bf16>());
    case WeightFormat::int8:
      return call(std::integral_constant<WeightFormat, WeightFormat::int8>());
    case WeightFormat::int4:
      return call(std::integral_constant<WeightFormat, WeightFormat::int4>());
  }
}


// One warp: the dot products of a run of at most 32 rows; lane i gets row i's.
template <WeightFormat F>
__device__ __forceinline__ float dot_rows(WeightRing& ring, const RowShape& row, int rows, const SharedX& x, int lane) {
  const int pieces = row.segment_bytes / 16, segments = row.segments, columns = row.columns, side = row.side;
  float mine = 0;
  for (int r = 0; r < rows; ++r) {
    float sum = 0;
    for (int segment = 0; segment < segments; ++segment) {
      const std::byte* const weights = ring.wait();
      const std::byte* const scales = ring.scales() + r * side;
      const std::byte* const minimums = ring.minimums() + r * side;
      sum = dot_stage<F>(weights, pieces, scales, minimums, x, columns, segment * pieces, lane, sum);
      ring.pass(r == rows - 1 && segment == segments - 1);
    }
    sum = warp_sum(sum);
    if (lane == r) mine = sum;
  }
  return mine;
}

}  // namespace lighter::kernels
