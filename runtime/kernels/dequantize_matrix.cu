#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "runtime/error.h"
#include "runtime/kernels/dequantize_matrix.h"

namespace lighter::kernels {
namespace {

constexpr int kThreads = 256;

// A thread turns 8 bytes of q into 8 (int8) or twice 8 (int4) values; blocks take the rows in turn.
template <Encoding E>
__global__ void __launch_bounds__(kThreads)
    dequantize(const uint2* q, const __half* scales, const __half* minimums, int64_t rows, int columns,
               __nv_bfloat16* out, int64_t stride) {
  constexpr int group = E == Encoding::int8 ? 128 : 64;
  constexpr int values_each = E == Encoding::int8 ? 8 : 16;
  const int pieces = columns / values_each, groups = columns / group;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const int piece = blockIdx.x * kThreads + threadIdx.x;
    if (piece >= pieces) return;
    const int in_row = E == Encoding::int8 ? piece / 16 : piece / 4;
    const int start = E == Encoding::int8 ? piece * 8 : in_row * 64 + piece % 4 * 8;
    const uint2 bytes = q[row * pieces + piece];
    const float scale = __half2float(scales[row * groups + in_row]);
    const float minimum = E == Encoding::int8 ? 0.0f : __half2float(minimums[row * groups + in_row]);
#pragma unroll
    for (int run = 0; run < values_each / 8; ++run) {
      __align__(16) __nv_bfloat16 values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t byte = (i < 4 ? bytes.x : bytes.y) >> (i % 4 * 8) & 0xff;
        const int value =
            E == Encoding::int8 ? static_cast<int8_t>(byte) : static_cast<int>(byte >> run * 4 & 15);
        values[i] = __float2bfloat16_rn(__fmaf_rn(scale, static_cast<float>(value), minimum));
      }
      *reinterpret_cast<uint4*>(out + row * stride + start + run * 32) =
          *reinterpret_cast<const uint4*>(values);
    }
  }
}

}  // namespace

void dequantize_matrix(Encoding encoding, const PackedRows& from, int64_t rows, int64_t columns, void* out,
                       int64_t stride, void* stream) {
  if (rows < 0 || columns <= 0 || columns >= int64_t{1} << 30 || columns % group_size(encoding) != 0 ||
      stride < columns || stride % 8 != 0) {
    throw ConfigError("cannot unpack a matrix of " + std::to_string(rows) + " rows of " +
                      std::to_string(columns) + " columns into rows of " + std::to_string(stride) +
                      ": columns must be a multiple of " + std::to_string(group_size(encoding)) +
                      ", and the rows' distance one of 8 and no less");
  }
  if (rows == 0) return;
  const int pieces = static_cast<int>(columns / (encoding == Encoding::int8 ? 8 : 16));
  const dim3 blocks((pieces + kThreads - 1) / kThreads,
                    static_cast<unsigned>(std::min<int64_t>(rows, 65535)));
  const auto kernel = encoding == Encoding::int8 ? dequantize<Encoding::int8> : dequantize<Encoding::int4>;
  kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint2*>(from.q), static_cast<const __half*>(from.scales),
      static_cast<const __half*>(from.minimums), rows, static_cast<int>(columns),
      static_cast<__nv_bfloat16*>(out), stride);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw DeviceError(std::string("unpacking a matrix: ") + cudaGetErrorString(error));
  }
}

}  // namespace lighter::kernels
