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
#include "runtime/kernels/weight_stream.cuh"

namespace lighter::kernels {

template <WeightFormat F>
struct Format;
template <>
struct Format<WeightFormat::bf16> {
  static constexpr int group = 64, piece_values = 8;  // a group only divides work here
  static constexpr bool quantized = false, minimums = false;
  __host__ __device__ static constexpr int64_t bytes(int64_t values) { return 2 * values; }
};
template <>
struct Format<WeightFormat::int8> {
  static constexpr int group = 128, piece_values = 16;
  static constexpr bool quantized = true, minimums = false;
  __host__ __device__ static constexpr int64_t bytes(int64_t values) { return values; }
};
template <>
struct Format<WeightFormat::int4> {
  static constexpr int group = 64, piece_values = 32;
  static constexpr bool quantized = true, minimums = true;
  __host__ __device__ static constexpr int64_t bytes(int64_t values) { return values / 2; }
};

// Of one kind (scales or minima) for this many values.
template <WeightFormat F>
__host__ __device__ constexpr int64_t side_bytes(int64_t values) {
  return Format<F>::quantized ? values / Format<F>::group * 2 : 0;
}

// values: bf16 [tokens, columns], or int8 [tokens, columns]. For int4 weights a token's int8 lie in two
// planes, each group's first and second half, since a byte of weights holds one value of each.
struct SharedX {
  std::byte* values;
  float* scales;  // [tokens, columns / group]
  float* sums;    // likewise; int4: scale * sum of the group's q
};

template <WeightFormat F>
__host__ __device__ int64_t x_bytes(int64_t columns, int tokens) {
  if (!Format<F>::quantized) return 2 * columns * tokens;
  return tokens * (columns + columns / Format<F>::group * 4 * (Format<F>::minimums ? 2 : 1));
}

template <WeightFormat F>
__device__ SharedX shared_x(std::byte* memory, int columns, int tokens) {
  auto* const scales = reinterpret_cast<float*>(memory + tokens * columns);
  return {memory, scales, scales + tokens * (columns / Format<F>::group)};
}

__device__ inline float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// Lanes of one group hold 4 consecutive values each. Returns them as 4 int8; the first lane of the group gets
// right scale and sum.
template <int Group>
__device__ uint32_t quantize4(float4 v, int lane, float& scale, float& sum) {
  constexpr int lanes = Group / 4;
  float most = max_nan(max_nan(fabsf(v.x), fabsf(v.y)), max_nan(fabsf(v.z), fabsf(v.w)));
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) most = max_nan(most, __shfl_xor_sync(~0u, most, step));
  scale = __fdiv_rn(most, 127.0f);
  const float values[4] = {v.x, v.y, v.z, v.w};
  uint32_t packed = 0;
  int total = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int q = scale == 0 ? 0 : max(-127, min(127, __float2int_rn(__fdiv_rn(values[i], scale))));
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
__device__ void put_x(const SharedX& x, int columns, int token, int first, float4 v, int lane) {
  if constexpr (F == WeightFormat::bf16) {
    auto* const to = reinterpret_cast<__nv_bfloat162*>(x.values) + (token * columns + first) / 2 + lane * 2;
    to[0] = __floats2bfloat162_rn(v.x, v.y);
    to[1] = __floats2bfloat162_rn(v.z, v.w);
  } else {
    constexpr int group = Format<F>::group, lanes = group / 4;
    float scale, sum;
    const uint32_t q = quantize4<group>(v, lane, scale, sum);
    const int value = first + lane * 4;
    *reinterpret_cast<uint32_t*>(x.values + token * columns + place_of<F>(value, columns)) = q;
    if (lane % lanes == 0) {
      const int at = token * (columns / group) + value / group;
      x.scales[at] = scale;
      if constexpr (Format<F>::minimums) x.sums[at] = sum;
    }
  }
}

// Whole block; columns is a multiple of 128. Ends with a barrier.
template <WeightFormat F, int B>
__device__ void load_x(const SharedX& x, const float* from, int columns, int warp, int lane) {
  for (int chunk = warp; chunk < B * (columns / 128); chunk += kStreamWarps) {
    const int token = chunk / (columns / 128), first = chunk % (columns / 128) * 128;
    const float4 v = __ldcg(reinterpret_cast<const float4*>(from + token * columns + first) + lane);
    put_x<F>(x, columns, token, first, v, lane);
  }
  __syncthreads();
}

// A warp's part of a norm's weights, loaded before the previous kernel has ended.
struct NormWeights {
  static constexpr int most = 64 / kStreamWarps;  // chunks of 128 of a warp: columns <= 8192
  uint2 values[most];

  __device__ NormWeights(const NormedInput& input, int columns, int warp, int lane) {
    const auto* const weights = reinterpret_cast<const uint2*>(input.weight);
#pragma unroll
    for (int i = 0; i < most; ++i) {
      const int chunk = warp + i * kStreamWarps;
      values[i] = weights != nullptr && chunk < columns / 128 ? weights[chunk * 32 + lane] : uint2{};
    }
  }
};

// The same of the normed residual: x * rsqrt(mean(x^2) + eps) * weight, in fp32. scratch: B * kStreamWarps
// floats. Ends with a barrier.
template <WeightFormat F, int B>
__device__ void load_normed_x(const SharedX& x, const NormedInput& input, const NormWeights& weights,
                              float* scratch, int columns, int warp, int lane) {
  constexpr int most = NormWeights::most;
  const int chunks = columns / 128;
#pragma unroll
  for (int token = 0; token < B; ++token) {
    const auto* const from = reinterpret_cast<const float4*>(input.residual + token * columns);
    float4 v[most];
    float squares = 0;
#pragma unroll
    for (int i = 0; i < most; ++i) {
      const int chunk = warp + i * kStreamWarps;
      if (chunk < chunks) v[i] = __ldcg(from + chunk * 32 + lane);
    }
#pragma unroll
    for (int i = 0; i < most; ++i) {
      if (warp + i * kStreamWarps < chunks) {
        squares += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
      }
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
    if (lane == 0) scratch[token * kStreamWarps + warp] = squares;
    __syncthreads();
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kStreamWarps; ++i) sum += scratch[token * kStreamWarps + i];
    const float unit = rsqrtf(sum / static_cast<float>(columns) + input.eps);
#pragma unroll
    for (int i = 0; i < most; ++i) {
      const int chunk = warp + i * kStreamWarps;
      if (chunk >= chunks) break;
      const uint2 packed = weights.values[i];
      v[i].x *= unit * __uint_as_float(packed.x << 16);
      v[i].y *= unit * __uint_as_float(packed.x & 0xffff0000);
      v[i].z *= unit * __uint_as_float(packed.y << 16);
      v[i].w *= unit * __uint_as_float(packed.y & 0xffff0000);
      put_x<F>(x, columns, token, chunk * 128, v[i], lane);
    }
  }
  __syncthreads();
}

__device__ inline float half_of(const std::byte* halves, int i) {
  return __half2float(reinterpret_cast<const __half*>(halves)[i]);
}

// One 16-byte piece of weights, number `piece` of its row, with the same piece of x. scales, minimums: the
// row's.
template <WeightFormat F, int B>
__device__ void dot_piece(uint4 w, const std::byte* scales, const std::byte* minimums, const SharedX& x,
                          int columns, int piece, float (&sum)[B]) {
  if constexpr (F == WeightFormat::bf16) {
    const uint32_t ws[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int b = 0; b < B; ++b) {
      const uint4 v = *reinterpret_cast<const uint4*>(x.values + 2 * b * columns + piece * 16);
      const uint32_t vs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[b] = fmaf(__uint_as_float(ws[i] << 16), __uint_as_float(vs[i] << 16), sum[b]);
        sum[b] = fmaf(__uint_as_float(ws[i] & 0xffff0000), __uint_as_float(vs[i] & 0xffff0000), sum[b]);
      }
    }
  } else if constexpr (F == WeightFormat::int8) {
    const float scale = half_of(scales, piece / 8);
#pragma unroll
    for (int b = 0; b < B; ++b) {
      const int4 v = *reinterpret_cast<const int4*>(x.values + b * columns + piece * 16);
      int dot = __dp4a(static_cast<int>(w.x), v.x, 0);
      dot = __dp4a(static_cast<int>(w.y), v.y, dot);
      dot = __dp4a(static_cast<int>(w.z), v.z, dot);
      dot = __dp4a(static_cast<int>(w.w), v.w, dot);
      sum[b] = fmaf(scale * x.scales[b * (columns / 128) + piece / 8], static_cast<float>(dot), sum[b]);
    }
  } else {
    const int group = piece / 2;
    const float scale = half_of(scales, group);
    const float minimum = piece % 2 == 0 ? half_of(minimums, group) : 0.0f;
    constexpr uint32_t low = 0x0f0f0f0f;
#pragma unroll
    for (int b = 0; b < B; ++b) {
      const std::byte* const at = x.values + b * columns + piece * 16;
      const int4 v = *reinterpret_cast<const int4*>(at);
      const int4 u = *reinterpret_cast<const int4*>(at + columns / 2);
      int dot = __dp4a(static_cast<int>(w.x & low), v.x, 0);
      dot = __dp4a(static_cast<int>(w.y & low), v.y, dot);
      dot = __dp4a(static_cast<int>(w.z & low), v.z, dot);
      dot = __dp4a(static_cast<int>(w.w & low), v.w, dot);
      int other = __dp4a(static_cast<int>(w.x >> 4 & low), u.x, 0);
      other = __dp4a(static_cast<int>(w.y >> 4 & low), u.y, other);
      other = __dp4a(static_cast<int>(w.z >> 4 & low), u.z, other);
      other = __dp4a(static_cast<int>(w.w >> 4 & low), u.w, other);
      const int at_group = b * (columns / 64) + group;
      sum[b] = fmaf(scale * x.scales[at_group], static_cast<float>(dot + other), sum[b]);
      sum[b] = fmaf(minimum, x.sums[at_group], sum[b]);
    }
  }
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

// The stages of a ring beside `rest` bytes of shared memory: as many as leave room for the next kernel's
// blocks on the same multiprocessor, or, where not even two do, two. Throws ConfigError if two are too many.
inline int stages_that_fit(int stage_bytes, int side_bytes, int64_t rest) {
  constexpr int64_t half = 111 * 1024, all = 226 * 1024;
  const auto fits = [&](int stages, int64_t limit) {
    return StreamShape{stages, stage_bytes, side_bytes}.bytes() + rest <= limit;
  };
  for (int stages = kMostStages; stages > 1; --stages) {
    if (fits(stages, half)) return stages;
  }
  if (fits(2, all)) return 2;
  throw ConfigError("a decode step needs " + std::to_string(rest) +
                    " bytes of shared memory for activations, more than " + std::to_string(all) +
                    "; set decode: eager");
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

// One warp: the row's dot products, complete in every lane. refill: called by all lanes after each segment.
template <WeightFormat F, int B, typename Refill>
__device__ void dot_row(WarpStream& stream, const RowShape& row, const SharedX& x, int lane, float (&sum)[B],
                        const Refill& refill) {
#pragma unroll
  for (int b = 0; b < B; ++b) sum[b] = 0;
  const int pieces = row.segment_bytes / 16;
  for (int segment = 0; segment < row.segments; ++segment) {
    const std::byte* const weights = stream.wait();
    const std::byte* const scales = stream.side();
#pragma unroll
    for (int i = 0; i < kStageBytes / 512; ++i) {
      const int piece = i * 32 + lane;
      if (piece < pieces) {
        dot_piece<F, B>(*reinterpret_cast<const uint4*>(weights + piece * 16), scales, scales + row.side, x,
                        row.columns, segment * pieces + piece, sum);
      }
    }
    stream.pass();
    refill();
  }
  if (Format<F>::quantized) stream.next_side();
#pragma unroll
  for (int b = 0; b < B; ++b) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum[b] += __shfl_xor_sync(~0u, sum[b], step);
  }
}

}  // namespace lighter::kernels
