#include "offload/gpu_rates.h"

#include <cuda_runtime_api.h>

#include <string>

#include "offload/cpu_rates.h"
#include "runtime/error.h"
#include "runtime/kernels/decode.h"
#include "runtime/kernels/read_memory.h"

namespace lighter::offload {
namespace {

constexpr int64_t kRows = 16384, kColumns = 5120;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw DeviceError(std::string("measuring rates: ") + what + ": " + cudaGetErrorString(error));
}

}  // namespace

GpuReading::GpuReading(Device& device)
    : in_(device.allocate(kColumns * sizeof(float), "measuring rates")),
      out_(device.allocate(kRows * sizeof(float), "measuring rates")) {
  check(cudaMemset(in_.data(), 0x3c, in_.bytes()), "clearing");  // 0.0115 in fp32
  check(cudaStreamSynchronize(nullptr), "clearing");
}

uint64_t GpuReading::read(Stream& stream, const std::byte* memory, uint64_t bytes) {
  kernels::read_memory(memory, bytes, reinterpret_cast<uint64_t*>(out_.data()), stream.native_handle());
  return bytes;
}

uint64_t GpuReading::decode(Stream& stream, SliceEncoding encoding, const std::byte* memory, uint64_t bytes) {
  kernels::DecodeLinear linear;
  linear.rows = kRows;
  linear.columns = kColumns;
  linear.x = reinterpret_cast<const float*>(in_.data());
  linear.out = reinterpret_cast<float*>(out_.data());
  uint64_t matrix = static_cast<uint64_t>(kRows * kColumns * 2);
  PackedMatrix packed;
  if (encoding != SliceEncoding::dense) {
    linear.format =
        encoding == SliceEncoding::int8 ? kernels::WeightFormat::int8 : kernels::WeightFormat::int4;
    matrix = packed_matrix_bytes(encoding, kRows, kColumns);
    packed = packed_matrix_layout(encoding, kRows, kColumns);
  }
  uint64_t at = 0;
  for (; at + matrix <= bytes; at += matrix) {
    linear.weights = memory + at + packed.values_at;
    if (encoding != SliceEncoding::dense) linear.scales = memory + at + packed.scales_at;
    if (encoding == SliceEncoding::int4) linear.minimums = memory + at + packed.minimums_at;
    kernels::decode_linear(linear, stream.native_handle());
  }
  return at;
}

}  // namespace lighter::offload
