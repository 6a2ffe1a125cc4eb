#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "runtime/device/host_words.h"
#include "runtime/error.h"
#include "runtime/kernels/signals.cuh"

namespace lighter {
namespace {

// A kernel has up to 32 KB of parameters; few values should not make so large ones.
constexpr int kFew = 128, kMany = 2048;

template <int N>
struct Values {
  int64_t of[N];
};

template <int N>
__global__ void put(const __grid_constant__ Values<N> values, int64_t* to, int count) {
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < count;
       i += gridDim.x * blockDim.x) {
    to[i] = values.of[i];
  }
}

__global__ void hold(const uint32_t* word, uint32_t value) {
  while (static_cast<int32_t>(kernels::load_system(word) - value) < 0) __nanosleep(500);
}

void check_launch(const char* doing) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw DeviceError(std::string("CUDA: ") + doing + ": " + cudaGetErrorString(error));
}

template <int N>
void launch(int64_t* to, const int64_t* from, int count, void* stream) {
  Values<N> values;
  std::copy(from, from + count, values.of);
  put<N><<<(count + 127) / 128, 128, 0, static_cast<cudaStream_t>(stream)>>>(values, to, count);
}

}  // namespace

void put_values(int64_t* to, const int64_t* values, int64_t count, void* stream) {
  while (count > 0) {
    const int here = static_cast<int>(std::min<int64_t>(count, kMany));
    here <= kFew ? launch<kFew>(to, values, here, stream) : launch<kMany>(to, values, here, stream);
    to += here;
    values += here;
    count -= here;
  }
  check_launch("putting values");
}

void hold_stream(const std::atomic<uint32_t>* word, uint32_t value, void* stream) {
  static_assert(sizeof *word == sizeof value);
  hold<<<1, 1, 0, static_cast<cudaStream_t>(stream)>>>(reinterpret_cast<const uint32_t*>(word), value);
  check_launch("waiting for the host");
}

}  // namespace lighter
