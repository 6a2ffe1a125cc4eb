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

// The program that has been made last, and what it reads.
struct GpuReading::Decoding {
  SliceEncoding encoding = SliceEncoding::dense;
  const std::byte* memory = nullptr;
  uint64_t bytes = 0;
  Buffer room;
  kernels::DecodeProgram program;
  uint64_t bytes_read = 0;
};

GpuReading::GpuReading(Device& device)
    : device_(device),
      in_(device.allocate(kColumns * sizeof(float), "measuring rates")),
      out_(device.allocate(kRows * sizeof(float), "measuring rates")) {
  check(cudaMemset(in_.data(), 0x3c, in_.bytes()), "clearing");  // 0.0115 in fp32
  check(cudaStreamSynchronize(nullptr), "clearing");
}

GpuReading::~GpuReading() = default;

uint64_t GpuReading::read(Stream& stream, const std::byte* memory, uint64_t bytes) {
  kernels::read_memory(memory, bytes, reinterpret_cast<uint64_t*>(out_.data()), stream.native_handle());
  return bytes;
}

uint64_t GpuReading::decode(Stream& stream, SliceEncoding encoding, const std::byte* memory, uint64_t bytes) {
  if (decoding_ == nullptr || decoding_->encoding != encoding || decoding_->memory != memory ||
      decoding_->bytes != bytes) {
    stream.synchronize();  // the program before may be running
    decoding_ = nullptr;
    decoding_ = make_decoding(stream, encoding, memory, bytes);
  }
  decoding_->program.enqueue(stream.native_handle());
  return decoding_->bytes_read;
}

std::unique_ptr<GpuReading::Decoding> GpuReading::make_decoding(Stream& stream, SliceEncoding encoding,
                                                                const std::byte* memory, uint64_t bytes) {
  auto made = std::make_unique<Decoding>();
  made->encoding = encoding;
  made->memory = memory;
  made->bytes = bytes;
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
  const int count = static_cast<int>(bytes / matrix);
  for (int i = 0; i < count; ++i) {
    const std::byte* const at = memory + i * matrix;
    linear.weights = at + packed.values_at;
    if (encoding != SliceEncoding::dense) linear.scales = at + packed.scales_at;
    if (encoding == SliceEncoding::int4) linear.minimums = at + packed.minimums_at;
    made->program.add(linear);
  }
  made->room = device_.allocate(kernels::DecodeProgram::bytes(count), "measuring rates");
  made->program.place(made->room.data(), stream.native_handle());
  made->bytes_read = matrix * static_cast<uint64_t>(count);
  return made;
}

}  // namespace lighter::offload
