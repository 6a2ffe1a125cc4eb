#include <algorithm>

#include "models/tensor_source.h"
#include "models/weights.h"
#include "runtime/torch/tensors.h"

namespace lighter::models {
namespace {

constexpr uint64_t kAlignment = 256;
constexpr uint64_t kStagingBytes = uint64_t{64} << 20;

uint64_t padded_bytes(const Weight& weight, DType dtype) {
  const uint64_t bytes = static_cast<uint64_t>(weight.elements()) * dtype_size(dtype);
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

bool stays_on_host(const Weight& weight) {
  return weight.role == WeightRole::embedding;
}

uint64_t sum_bytes(const ModelSpec& spec, DType dtype, bool host) {
  uint64_t sum = 0;
  for (const Weight& weight : list_weights(spec)) {
    if (stays_on_host(weight) == host) sum += padded_bytes(weight, dtype);
  }
  return sum;
}

// Reads a weight to its place, through the staging buffer when the host cannot write there.
class Filler {
 public:
  Filler(Device& device, const TensorSource& source, DType dtype)
      : source_(source), dtype_(dtype), stream_(device.new_copy_stream()) {
    if (device.is_cuda()) staging_ = device.allocate_host(kStagingBytes, "staging for loading");
  }

  void fill(const Weight& weight, std::byte* to, bool staged) {
    for (const TensorPart& part : weight.parts) {
      const int64_t step = kStagingBytes / dtype_size(dtype_);
      for (int64_t first = 0; first < part.elements(); first += step) {
        const int64_t count = std::min(step, part.elements() - first);
        source_.read(part, first, count, dtype_, staged ? staging_.data() : to);
        if (staged) {
          stream_->copy(to, staging_.data(), count * dtype_size(dtype_));
          stream_->synchronize();
        }
        to += count * dtype_size(dtype_);
      }
    }
  }

 private:
  const TensorSource& source_;
  const DType dtype_;
  Buffer staging_;
  std::unique_ptr<Stream> stream_;
};

}  // namespace

uint64_t LoadedWeights::device_bytes(const ModelSpec& spec, DType dtype) {
  return sum_bytes(spec, dtype, false);
}
uint64_t LoadedWeights::host_bytes(const ModelSpec& spec, DType dtype) {
  return sum_bytes(spec, dtype, true);
}
uint64_t LoadedWeights::staging_bytes(bool cuda) {
  return cuda ? kStagingBytes : 0;
}

LoadedWeights::LoadedWeights(Device& device, const ModelSpec& spec, const TensorSource& source, DType dtype,
                             const Progress& progress)
    : on_device_(device.allocate(device_bytes(spec, dtype), "weights")),
      on_host_(device.allocate_host(host_bytes(spec, dtype), "the embedding")) {
  Filler filler(device, source, dtype);
  std::byte* next_device = on_device_.data();
  std::byte* next_host = on_host_.data();
  const uint64_t total = on_device_.bytes() + on_host_.bytes();
  uint64_t done = 0;
  for (const Weight& weight : list_weights(spec)) {
    const bool host = stays_on_host(weight);
    std::byte*& next = host ? next_host : next_device;
    filler.fill(weight, next, !host && device.is_cuda());
    tensors_[{weight.role, weight.layer}] =
        host ? host_view_of(next, weight.shape(), dtype) : view_of(next, weight.shape(), device, dtype);
    next += padded_bytes(weight, dtype);
    done += padded_bytes(weight, dtype);
    progress("weights", done, total);
  }
}

}  // namespace lighter::models
