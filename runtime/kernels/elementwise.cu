#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <string>

#include "runtime/error.h"
#include "runtime/kernels/elementwise.h"

namespace lighter::kernels {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kThreads = 256;

void check_launch(const char* what) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw DeviceError(std::string(what) + ": " + cudaGetErrorString(error));
}

struct Eight {
  __align__(16) bf16 v[8];
};

__device__ Eight load(const bf16* from) {
  Eight eight;
  *reinterpret_cast<uint4*>(eight.v) = *reinterpret_cast<const uint4*>(from);
  return eight;
}

__device__ void store(bf16* to, const Eight& eight) {
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(eight.v);
}

__device__ float rounded(float x) {
  return __bfloat162float(__float2bfloat16_rn(x));
}

__device__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const bf16* x, const bf16* weight, float eps, int width, bf16* out) {
  __shared__ float parts[kThreads / 32];
  const int64_t at = static_cast<int64_t>(blockIdx.x) * width;
  float sum = 0;
  for (int i = threadIdx.x * 8; i < width; i += kThreads * 8) {
    const Eight eight = load(x + at + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += __bfloat162float(eight.v[j]) * __bfloat162float(eight.v[j]);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) sum += parts[i];
  const float factor = rsqrtf(sum / static_cast<float>(width) + eps);
  for (int i = threadIdx.x * 8; i < width; i += kThreads * 8) {
    Eight eight = load(x + at + i);
    const Eight scale = load(weight + i);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      eight.v[j] =
          __float2bfloat16_rn(rounded(__bfloat162float(eight.v[j]) * factor) * __bfloat162float(scale.v[j]));
    }
    store(out + at + i, eight);
  }
}

__global__ void __launch_bounds__(kThreads)
    silu_times_kernel(const bf16* gate_up, int64_t pieces, int pieces_of_a_row, bf16* out) {
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (piece >= pieces) return;
  const int64_t row = piece / pieces_of_a_row, column = piece - row * pieces_of_a_row;
  const bf16* const gate = gate_up + (row * 2 * pieces_of_a_row + column) * 8;
  Eight g = load(gate);
  const Eight u = load(gate + static_cast<int64_t>(pieces_of_a_row) * 8);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float x = __bfloat162float(g.v[j]);
    g.v[j] = __float2bfloat16_rn(rounded(x / (1.0f + expf(-x))) * __bfloat162float(u.v[j]));
  }
  store(out + piece * 8, g);
}

// A warp for each head of a token. Lane i holds the head's values in two halves of pairs: with neighbours
// rotated (interleaved) 2 * (i + 32 j) and the next one, else i + 32 j and that half a head further.
template <int HeadDim>
__global__ void __launch_bounds__(kThreads) qkv_kernel(QkvStep s) {
  constexpr int half = HeadDim / 2, n = (half + 31) / 32;
  const int all = s.heads + 2 * s.kv_heads;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (item >= s.tokens * all) return;
  const int lane = threadIdx.x % 32, head = static_cast<int>(item % all);
  const int64_t token = item / all;
  const bf16* const from = static_cast<const bf16*>(s.qkv) + item * HeadDim;
  const bool is_q = head < s.heads, is_v = head >= s.heads + s.kv_heads;
  bf16* const to =
      is_q ? static_cast<bf16*>(s.q) + (token * s.heads + head) * HeadDim
           : static_cast<bf16*>(is_v ? s.values : s.keys) +
                 (s.rows[token] * s.kv_heads + head - s.heads - (is_v ? s.kv_heads : 0)) * HeadDim;
  float a[n], b[n], squares = 0;
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const int i = lane + 32 * j;
    a[j] = b[j] = 0;
    if (i >= half) continue;
    a[j] = __bfloat162float(from[s.interleaved ? 2 * i : i]);
    b[j] = __bfloat162float(from[s.interleaved ? 2 * i + 1 : i + half]);
    if (is_v) continue;
    if (s.rope) {
      const float x = a[j], y = b[j], c = s.cos[token * half + i], d = s.sin[token * half + i];
      if (s.interleaved) {
        a[j] = rounded(__fsub_rn(__fmul_rn(x, c), __fmul_rn(y, d)));
        b[j] = rounded(__fadd_rn(__fmul_rn(x, d), __fmul_rn(y, c)));
      } else {
        const float cr = rounded(c), dr = rounded(d);
        a[j] = rounded(rounded(x * cr) - rounded(y * dr));
        b[j] = rounded(rounded(y * cr) + rounded(x * dr));
      }
    }
    squares += a[j] * a[j] + b[j] * b[j];
  }
  if (!is_v && s.qk_norm) {
    const float factor = rsqrtf(warp_sum(squares) / HeadDim + s.eps);
#pragma unroll
    for (int j = 0; j < n; ++j) a[j] = rounded(a[j] * factor), b[j] = rounded(b[j] * factor);
  }
  const float warmth = is_q && s.temperature != nullptr ? s.temperature[token] : 1.0f;
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const int i = lane + 32 * j;
    if (i >= half) continue;
    to[s.interleaved ? 2 * i : i] = __float2bfloat16_rn(a[j] * warmth);
    to[s.interleaved ? 2 * i + 1 : i + half] = __float2bfloat16_rn(b[j] * warmth);
  }
}

using QkvKernel = void (*)(QkvStep);

QkvKernel qkv_kernel_for(int head_dim) {
  switch (head_dim) {
    case 16:
      return qkv_kernel<16>;
    case 32:
      return qkv_kernel<32>;
    case 64:
      return qkv_kernel<64>;
    case 128:
      return qkv_kernel<128>;
    case 256:
      return qkv_kernel<256>;
    default:
      return nullptr;
  }
}

unsigned blocks_for(int64_t items, int64_t of_a_block) {
  return static_cast<unsigned>((items + of_a_block - 1) / of_a_block);
}

void check_width(int64_t width) {
  if (width > 0 && width % 8 == 0 && width < int64_t{1} << 28) return;
  throw ConfigError("rows of " + std::to_string(width) +
                    " values are not supported: their number must be a multiple of 8");
}

}  // namespace

void rms_norm(const void* x, const void* weight, float eps, int64_t rows, int64_t width, void* out,
              void* stream) {
  check_width(width);
  if (rows == 0) return;
  rms_norm_kernel<<<static_cast<unsigned>(rows), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const bf16*>(x), static_cast<const bf16*>(weight), eps, static_cast<int>(width),
      static_cast<bf16*>(out));
  check_launch("RMS norm");
}

void silu_times(const void* gate_up, int64_t rows, int64_t width, void* out, void* stream) {
  check_width(width);
  if (rows == 0) return;
  const int64_t pieces = rows * width / 8;
  silu_times_kernel<<<blocks_for(pieces, kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const bf16*>(gate_up), pieces, static_cast<int>(width / 8), static_cast<bf16*>(out));
  check_launch("SiLU");
}

bool qkv_step_supports(int head_dim) {
  return qkv_kernel_for(head_dim) != nullptr;
}

void qkv_step(const QkvStep& step, void* stream) {
  if (step.tokens == 0) return;
  const auto kernel = qkv_kernel_for(step.head_dim);
  if (kernel == nullptr) {
    throw ConfigError("heads of " + std::to_string(step.head_dim) +
                      " values are not supported; those of 16, 32, 64, 128 and 256 are");
  }
  const int64_t items = step.tokens * (step.heads + 2 * step.kv_heads);
  kernel<<<blocks_for(items, kThreads / 32), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(step);
  check_launch("queries, keys and values");
}

}  // namespace lighter::kernels
