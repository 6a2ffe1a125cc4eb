// Activations of a decode step in shared memory.
//
// int8 and int4 weights meet activations quantized to int8 (runtime/quant/activations.h has the same rule: a
// scale a group, max|x| / 127, q = rint(x / scale)), bf16 weights meet bf16.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "runtime/kernels/decode.h"
#include "runtime/kernels/launch.cuh"
#include "runtime/kernels/weight_stream.cuh"

namespace lighter::kernels {

// fetch_more: pieces that a warp brings into the second-level cache before it loads activations; by
// measurement, on an H100.
template <WeightFormat F>
struct Format;
template <>
struct Format<WeightFormat::bf16> {
  static constexpr int group = 64, piece_values = 8;  // a group only divides work here
  static constexpr bool quantized = false, minimums = false;
  static constexpr int fetch_more = 2;
  static constexpr int sides = 0;  // kinds of values that a group has: scales, minima
  __host__ __device__ static constexpr int64_t bytes(int64_t values) { return 2 * values; }
};
template <>
struct Format<WeightFormat::int8> {
  static constexpr int group = 128, piece_values = 16;
  static constexpr bool quantized = true, minimums = false;
  static constexpr int fetch_more = 0;
  static constexpr int sides = 1;
  __host__ __device__ static constexpr int64_t bytes(int64_t values) { return values; }
};
template <>
struct Format<WeightFormat::int4> {
  static constexpr int group = 64, piece_values = 32;
  static constexpr bool quantized = true, minimums = true;
  static constexpr int fetch_more = 0;
  static constexpr int sides = 2;
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

// a / b, rounded correctly, for normal b: what the library's division does, without its way out for the other
// cases, which is a call. inverse: of b.
__device__ inline float divide(float a, float b, float inverse) {
  const float quotient = a * inverse;
  return fmaf(fmaf(-quotient, b, a), inverse, quotient);
}
__device__ inline float inverse_of(float b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return fmaf(fmaf(-b, inverse, 1.0f), inverse, inverse);
}

// A thread's share of a token's activations: 16 values of one group, in four runs of 4, so that the lanes
// that share a group read whole sectors. Share number `share` begins with this value; its runs are run_stride
// apart.
template <WeightFormat F>
struct Share {
  static constexpr int lanes = Format<F>::group / 16;  // of a group
  static constexpr int run_stride = lanes * 4;
  __device__ static int first(int share) { return share / lanes * Format<F>::group + share % lanes * 4; }
};

// Four values of a group as int8; inverse: of its scale.
__device__ inline uint32_t quantized(float4 v, float scale, float inverse) {
  constexpr float least = 1e-30f;  // smaller groups are zeros
  const float values[4] = {v.x, v.y, v.z, v.w};
  uint32_t q = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int one = scale < least ? 0 : max(-127, min(127, __float2int_rn(divide(values[j], scale, inverse))));
    q |= (static_cast<uint32_t>(one) & 0xff) << (8 * j);
  }
  return q;
}
__device__ inline float largest(float most, float4 v) {
  return max_nan(most, max_nan(max_nan(fabsf(v.x), fabsf(v.y)), max_nan(fabsf(v.z), fabsf(v.w))));
}

// Past the first-level cache: other kernels write it while this one is under way.
template <WeightFormat F>
__device__ void load_share(const float* token, int share, float4 (&v)[4]) {
  const int first = Share<F>::first(share);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[i] = __ldcg(reinterpret_cast<const float4*>(token + first + i * Share<F>::run_stride));
  }
}

// The lanes of a group: as int8, four to a word. scale and sum are the group's.
template <WeightFormat F>
__device__ void quantize_share(const float4 (&v)[4], uint32_t (&q)[4], float& scale, float& sum) {
  float most = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) most = largest(most, v[i]);
#pragma unroll
  for (int step = Share<F>::lanes / 2; step > 0; step /= 2)
    most = max_nan(most, __shfl_xor_sync(~0u, most, step));
  scale = divide(most, 127.0f, 1.0f / 127.0f);
  const float inverse = inverse_of(scale);
  int total = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    q[i] = quantized(v[i], scale, inverse);
    total = __dp4a(static_cast<int>(q[i]), 0x01010101, total);
  }
  if constexpr (Format<F>::minimums) {
#pragma unroll
    for (int step = Share<F>::lanes / 2; step > 0; step /= 2) total += __shfl_xor_sync(~0u, total, step);
    sum = __fmul_rn(scale, static_cast<float>(total));
  }
}

// Where value v of a token lies among its int8.
template <WeightFormat F>
__device__ int place_of(int v, int columns) {
  if (F != WeightFormat::int4) return v;
  const int in_group = v % 64;
  return in_group / 32 * (columns / 2) + v / 64 * 32 + in_group % 32;
}

// All lanes of a warp, for their shares of a token; there: this lane has one.
template <WeightFormat F>
__device__ void put_share(const SharedX& x, int columns, int token, int share, const float4 (&v)[4],
                          bool there) {
  const int first = Share<F>::first(share);
  if constexpr (F == WeightFormat::bf16) {
    if (!there) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      auto* const to = reinterpret_cast<__nv_bfloat162*>(x.values) +
                       (token * columns + first + i * Share<F>::run_stride) / 2;
      to[0] = __floats2bfloat162_rn(v[i].x, v[i].y);
      to[1] = __floats2bfloat162_rn(v[i].z, v[i].w);
    }
  } else {
    uint32_t q[4];
    float scale, sum = 0;
    quantize_share<F>(v, q, scale, sum);
    if (!there) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int place = place_of<F>(first + i * Share<F>::run_stride, columns);
      *reinterpret_cast<uint32_t*>(x.values + token * columns + place) = q[i];
    }
    if (share % Share<F>::lanes == 0) {
      const int group = token * (columns / Format<F>::group) + share / Share<F>::lanes;
      x.scales[group] = scale;
      if constexpr (Format<F>::minimums) x.sums[group] = sum;
    }
  }
}

// Whole block: `tokens` rows of activations, one after the other. Does not end with a barrier.
template <WeightFormat F>
__device__ void load_x(const SharedX& x, const float* from, int columns, int tokens) {
  const int shares = columns / 16, all = tokens * shares;
  for (int i = threadIdx.x; i < (all + 31) / 32 * 32; i += blockDim.x) {
    const int at = min(i, all - 1), token = at / shares, share = at % shares;
    float4 v[4];
    load_share<F>(from + static_cast<int64_t>(token) * columns, share, v);
    put_share<F>(x, columns, token, share, v, i < all);
  }
}

// Shares of a row of at most 8192 columns that a thread has, every (Warps * 32)nd.
template <int Warps>
constexpr int kNormShares = 8192 / 16 / (Warps * 32);

// A thread's part of a norm's weights, loaded before the previous kernel has ended. columns <= 8192.
template <WeightFormat F, int Warps>
struct NormWeights {
  static constexpr int shares = kNormShares<Warps>;
  uint2 values[shares][4];

  __device__ NormWeights(const NormedInput& input, int columns) {
    const auto* const weights = static_cast<const __nv_bfloat16*>(input.weight);
#pragma unroll
    for (int s = 0; s < shares; ++s) {
      const int share = threadIdx.x + s * Warps * 32;
      const bool there = weights != nullptr && share < columns / 16;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int first = Share<F>::first(share) + i * Share<F>::run_stride;
        values[s][i] = there ? *reinterpret_cast<const uint2*>(weights + first) : uint2{};
      }
    }
  }
};

// The same of the residual times the norm's weights: what x is normed with besides, rsqrt(mean(x^2) + eps),
// is the same for all columns, so that the results can be multiplied with it (NormFactor, after a barrier).
// scratch: B * Warps floats.
template <WeightFormat F, int B, int Warps>
__device__ void load_normed_x(const SharedX& x, const NormedInput& input,
                              const NormWeights<F, Warps>& weights, float* scratch, int columns, int warp,
                              int lane) {
  const int shares = columns / 16;
#pragma unroll
  for (int token = 0; token < B; ++token) {
    float squares = 0;
    float4 v[kNormShares<Warps>][4];
#pragma unroll
    for (int s = 0; s < kNormShares<Warps>; ++s) {
      const int share = threadIdx.x + s * Warps * 32;
      if (share - lane < shares)
        load_share<F>(input.residual + token * columns, min(share, shares - 1), v[s]);
    }
#pragma unroll
    for (int s = 0; s < kNormShares<Warps>; ++s) {
      const int share = threadIdx.x + s * Warps * 32;
      if (share - lane >= shares) break;
      const bool there = share < shares;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float4& one = v[s][i];
        if (there) squares += one.x * one.x + one.y * one.y + one.z * one.z + one.w * one.w;
        const uint2 packed = weights.values[s][i];
        one.x *= __uint_as_float(packed.x << 16);
        one.y *= __uint_as_float(packed.x & 0xffff0000);
        one.z *= __uint_as_float(packed.y << 16);
        one.w *= __uint_as_float(packed.y & 0xffff0000);
      }
      put_share<F>(x, columns, token, min(share, shares - 1), v[s], there);
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
    if (lane == 0) scratch[token * Warps + warp] = squares;
  }
}

// Of each token.
template <int B, int Warps>
struct NormFactor {
  float of[B];

  __device__ NormFactor(const NormedInput& input, const float* scratch, int columns) {
#pragma unroll
    for (int token = 0; token < B; ++token) {
      of[token] = 1;
      if (input.residual == nullptr) continue;
      float sum = 0;
#pragma unroll
      for (int i = 0; i < Warps; ++i) sum += scratch[token * Warps + i];
      of[token] = rsqrtf(sum / static_cast<float>(columns) + input.eps);
    }
  }
};

}  // namespace lighter::kernels
