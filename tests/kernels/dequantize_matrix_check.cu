// Checks kernels::dequantize_matrix against exact arithmetic on random packed rows, and times it. Needs a
// GPU.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "runtime/kernels/dequantize_matrix.h"

using namespace lighter::kernels;

namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

template <typename T>
T* upload(const std::vector<T>& values) {
  T* memory = nullptr;
  check(cudaMalloc(&memory, values.size() * sizeof(T)));
  check(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return memory;
}

// Returns how many values are wrong.
size_t run(Encoding encoding, int64_t rows, int64_t columns, int64_t stride) {
  const bool int8 = encoding == Encoding::int8;
  const int64_t groups = rows * columns / group_size(encoding);
  std::mt19937 random(static_cast<unsigned>(rows + columns));
  std::vector<uint8_t> q(rows * columns / (int8 ? 1 : 2));
  for (auto& byte : q) {
    byte = static_cast<uint8_t>(random());
    if (int8 && byte == 0x80) byte = 0;
  }
  std::uniform_real_distribution<float> scale_of(0.001f, 0.1f), minimum_of(-1, 0.5f);
  std::vector<__half> scales(groups), minimums(groups);
  for (auto& scale : scales) scale = __float2half(scale_of(random));
  for (auto& minimum : minimums) minimum = __float2half(minimum_of(random));
  auto* const q_gpu = upload(q);
  auto* const scales_gpu = upload(scales);
  auto* const minimums_gpu = upload(minimums);
  auto* const out = upload(std::vector<__nv_bfloat16>(rows * stride, __float2bfloat16(77)));
  const auto unpack = [&] {
    dequantize_matrix(encoding, {q_gpu, scales_gpu, minimums_gpu}, rows, columns, out, stride, nullptr);
  };
  unpack();
  std::vector<__nv_bfloat16> values(rows * stride);
  check(cudaMemcpy(values.data(), out, values.size() * sizeof(__nv_bfloat16), cudaMemcpyDeviceToHost));
  size_t wrong = 0;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < stride; ++column) {
      double expected = 77;
      if (column < columns) {
        const int64_t at = row * columns + column, group = at / group_size(encoding),
                      in_group = at % group_size(encoding);
        const uint8_t byte = int8 ? q[at] : q[group * 32 + in_group % 32];
        const int value = int8 ? static_cast<int8_t>(byte) : in_group < 32 ? byte & 15 : byte >> 4;
        expected = static_cast<double>(__half2float(scales[group])) * value +
                   (int8 ? 0 : __half2float(minimums[group]));
      }
      const __nv_bfloat16 rounded = __float2bfloat16_rn(static_cast<float>(expected));
      wrong += std::memcmp(&rounded, &values[row * stride + column], sizeof rounded) != 0;
    }
  }
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  constexpr int times = 50;
  check(cudaEventRecord(begin));
  for (int i = 0; i < times; ++i) unpack();
  check(cudaEventRecord(end));
  check(cudaEventSynchronize(end));
  float ms = 0;
  check(cudaEventElapsedTime(&ms, begin, end));
  const double bytes = static_cast<double>(q.size()) + groups * (int8 ? 2.0 : 4.0) + rows * columns * 2.0;
  std::printf("%s  %6lld x %5lld, rows %5lld apart: %zu wrong, %7.1f us, %6.0f GB/s read and written\n",
              int8 ? "int8" : "int4", static_cast<long long>(rows), static_cast<long long>(columns),
              static_cast<long long>(stride), wrong, ms / times * 1e3, bytes / (ms / times * 1e-3) / 1e9);
  for (void* memory : {static_cast<void*>(q_gpu), static_cast<void*>(scales_gpu),
                       static_cast<void*>(minimums_gpu), static_cast<void*>(out)}) {
    check(cudaFree(memory));
  }
  return wrong;
}

}  // namespace

int main() {
  size_t wrong = 0;
  for (const Encoding encoding : {Encoding::int8, Encoding::int4}) {
    wrong += run(encoding, 16, 128, 128);
    wrong += run(encoding, 67, 384, 400);
    wrong += run(encoding, 5120, 512, 8192);  // down of a slice of Scout into the whole network's
    wrong += run(encoding, 7168, 5120, 5120);
    wrong += run(encoding, 70000, 640, 640);  // more rows than a grid has
  }
  std::printf(wrong == 0 ? "all right\n" : "%zu values are wrong\n", wrong);
  return wrong == 0 ? 0 : 1;
}
