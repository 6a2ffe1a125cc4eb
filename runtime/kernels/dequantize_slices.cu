#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>

#include "runtime/error.h"
#include "runtime/kernels/dequantize_slices.h"

namespace lighter::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kPieces = 4;  // of a thread, a block's width apart: enough loads under way

struct Slices {
  const std::byte* at[max_slices];
};

struct Shape {
  int hidden, width, first, total;
};

// A piece is 8 bytes of q: 8 (int8) or twice 8 (int4) values. blockIdx.y: slice and matrix.
template <Encoding E>
__global__ void __launch_bounds__(kThreads) dequantize(const __grid_constant__ Slices slices, Shape shape,
                                                       __nv_bfloat16* gate_up, __nv_bfloat16* down) {
  constexpr bool int8 = E == Encoding::int8;
  constexpr int group = int8 ? 128 : 64, values_each = int8 ? 8 : 16, pieces_of_a_group = int8 ? 16 : 4;
  const int slice = blockIdx.y / 3, matrix = blockIdx.y % 3;
  const int elements = shape.hidden * shape.width, pieces = elements / values_each, groups = elements / group;
  const int matrix_bytes = int8 ? elements : elements / 2;
  const std::byte* const base = slices.at[slice];
  const auto* q = reinterpret_cast<const uint2*>(base + static_cast<int64_t>(matrix) * matrix_bytes);
  const auto* scales = reinterpret_cast<const __half*>(base + 3ll * matrix_bytes) + matrix * groups;
  const __half* minimums = scales + 3 * groups;

  // Gate and up rows of a slice follow one another; a down row's columns are a part of the expert's.
  const int64_t all = static_cast<int64_t>(shape.total) * elements, number = shape.first + slice;
  __nv_bfloat16* const out =
      matrix == 2 ? down + number * shape.width : gate_up + matrix * all + number * elements;

  const int begin = blockIdx.x * kThreads * kPieces + threadIdx.x;
  uint2 bytes[kPieces];
  float scale[kPieces], minimum[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int piece = begin + i * kThreads;
    if (piece >= pieces) break;
    bytes[i] = q[piece];
    scale[i] = __half2float(scales[piece / pieces_of_a_group]);
    minimum[i] = int8 ? 0.0f : __half2float(minimums[piece / pieces_of_a_group]);
  }
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int piece = begin + i * kThreads;
    if (piece >= pieces) break;
    const int start = int8 ? piece * 8 : piece / 4 * 64 + piece % 4 * 8;
    int64_t to = start;
    if (matrix == 2) {
      const int row = start / shape.width;
      to = static_cast<int64_t>(row) * shape.total * shape.width + (start - row * shape.width);
    }
#pragma unroll
    for (int run = 0; run < values_each / 8; ++run) {
      __align__(16) __nv_bfloat16 values[8];
#pragma unroll
      for (int v = 0; v < 8; ++v) {
        const uint32_t byte = (v < 4 ? bytes[i].x : bytes[i].y) >> (v % 4 * 8) & 0xff;
        const int value = int8 ? static_cast<int8_t>(byte) : static_cast<int>(byte >> run * 4 & 15);
        values[v] = __float2bfloat16_rn(__fmaf_rn(scale[i], static_cast<float>(value), minimum[i]));
      }
      *reinterpret_cast<uint4*>(out + to + run * 32) = *reinterpret_cast<const uint4*>(values);
    }
  }
}

}  // namespace

void dequantize_slices(Encoding encoding, QuantSliceShape shape, const ExpertSlices& expert, void* gate_up,
                       void* down, void* stream) {
  quant_slice_bytes(encoding, shape);  // checks the shape
  if (expert.count < 0 || expert.count > max_slices || expert.first < 0 ||
      expert.first + expert.count > expert.total) {
    throw ConfigError("cannot unpack the slices " + std::to_string(expert.first) + " to " +
                      std::to_string(expert.first + expert.count) + " of an expert of " +
                      std::to_string(expert.total) + "; at most " + std::to_string(max_slices) + " at once");
  }
  if (expert.count == 0) return;
  Slices slices{};
  for (int i = 0; i < expert.count; ++i) slices.at[i] = static_cast<const std::byte*>(expert.slices[i]);
  const int64_t pieces = shape.hidden * shape.width / (encoding == Encoding::int8 ? 8 : 16);
  const int64_t of_a_block = kThreads * kPieces;
  const dim3 blocks(static_cast<unsigned>((pieces + of_a_block - 1) / of_a_block),
                    static_cast<unsigned>(expert.count * 3));
  const auto kernel = encoding == Encoding::int8 ? dequantize<Encoding::int8> : dequantize<Encoding::int4>;
  kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      slices, {static_cast<int>(shape.hidden), static_cast<int>(shape.width), expert.first, expert.total},
      static_cast<__nv_bfloat16*>(gate_up), static_cast<__nv_bfloat16*>(down));
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw DeviceError(std::string("unpacking an expert: ") + cudaGetErrorString(error));
  }
}

}  // namespace lighter::kernels
