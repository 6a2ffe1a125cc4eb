#include <algorithm>

#include "models/tensor_source.h"
#include "models/weight_formats.h"
#include "runtime/torch/tensors.h"

namespace lighter::models {
namespace {

constexpr uint64_t kAlignment = 256;
constexpr uint64_t kStagingBytes = uint64_t{64} << 20;

uint64_t padded_bytes(const WeightFormats& formats, const Weight& weight) {
  return (weight_bytes(formats, weight) + kAlignment - 1) / kAlignment * kAlignment;
}

bool stays_on_host(const Weight& weight) {
  return weight.role == WeightRole::embedding;
}

uint64_t sum_bytes(const ModelSpec& spec, const WeightFormats& formats, bool host) {
  uint64_t sum = 0;
  for (const Weight& weight : list_weights(spec)) {
    if (stays_on_host(weight) == host) sum += padded_bytes(formats, weight);
  }
  return sum;
}

// Room for at least one slice of every packed network.
uint64_t staging_buffer_bytes(const ModelSpec& spec, const WeightFormats& formats) {
  uint64_t most = kStagingBytes;
  for (const Weight& weight : list_weights(spec)) {
    const uint64_t bytes = weight_bytes(formats, weight);
    if (formats.of(weight) == SliceEncoding::dense || bytes == 0) continue;
    const PackedWeight form = packed_form(formats, weight);
    if (form.is_ffn()) most = std::max(most, form.slice_bytes());
  }
  return most;
}

// Reads a weight to its place, through the staging buffer when the host cannot write there.
class Filler {
 public:
  Filler(Device& device, const TensorSource& source, DType dtype, uint64_t staging_bytes)
      : source_(source), dtype_(dtype), stream_(device.new_copy_stream()) {
    if (device.is_cuda()) staging_ = device.allocate_host(staging_bytes, "staging for loading");
  }

  void fill(const Weight& weight, std::byte* to, bool staged) {
    for (const TensorPart& part : weight.parts) {
      const int64_t step = kStagingBytes / dtype_size(dtype_);
      for (int64_t first = 0; first < part.elements(); first += step) {
        const int64_t count = std::min(step, part.elements() - first);
        source_.read(part, first, count, dtype_, staged ? staging_.data() : to);
        if (staged) move(to, staging_.data(), count * dtype_size(dtype_));
        to += count * dtype_size(dtype_);
      }
    }
  }

  void fill_matrix(const Weight& weight, const PackedWeight& form, std::byte* to, bool staged) {
    const PackedMatrix matrix = form.matrix();
    const bool int4 = form.encoding == SliceEncoding::int4;
    const int64_t row_bytes = value_bytes(form.encoding, form.columns);
    const int64_t group_bytes =
        form.columns / group_size(form.encoding) * static_cast<int64_t>(sizeof(uint16_t));
    const int64_t all = row_bytes + (int4 ? 2 : 1) * group_bytes;
    const int64_t step = staged ? static_cast<int64_t>(staging_.bytes()) / all : form.rows;
    for (int64_t first = 0; first < form.rows; first += step) {
      const int64_t count = std::min(step, form.rows - first);
      std::byte* const places[] = {to + matrix.values_at + first * row_bytes,
                                   to + matrix.scales_at + first * group_bytes,
                                   to + matrix.minimums_at + first * group_bytes};
      std::byte* const buffers[] = {staging_.data(), staging_.data() + count * row_bytes,
                                    staging_.data() + count * (row_bytes + group_bytes)};
      const auto& targets = staged ? buffers : places;
      source_.read_packed_rows(
          weight, form.encoding, first, count,
          {targets[0], reinterpret_cast<uint16_t*>(targets[1]), reinterpret_cast<uint16_t*>(targets[2])});
      if (!staged) continue;
      move(places[0], buffers[0], count * row_bytes);
      move(places[1], buffers[1], count * group_bytes);
      if (int4) move(places[2], buffers[2], count * group_bytes);
    }
  }

  void fill_ffn(const Weight& gate_up, const Weight& down, const PackedWeight& form, std::byte* to,
                bool staged) {
    const auto slice_bytes = static_cast<int64_t>(form.slice_bytes());
    const int64_t step = staged ? static_cast<int64_t>(staging_.bytes()) / slice_bytes : form.slices;
    for (int64_t first = 0; first < form.slices; first += step) {
      const int64_t count = std::min(step, form.slices - first);
      source_.read_packed_slices(gate_up, down, form, first, count,
                                 staged ? staging_.data() : to + first * slice_bytes);
      if (staged) move(to + first * slice_bytes, staging_.data(), count * slice_bytes);
    }
  }

 private:
  void move(std::byte* to, const std::byte* from, int64_t bytes) {
    stream_->copy(to, from, bytes);
    stream_->synchronize();
  }

  const TensorSource& source_;
  const DType dtype_;
  Buffer staging_;
  std::unique_ptr<Stream> stream_;
};

}  // namespace

const PackedWeight* LoadedWeights::packed(WeightRole role, int layer) const {
  const auto found = packed_.find({role, layer});
  return found == packed_.end() ? nullptr : &found->second;
}

uint64_t LoadedWeights::device_bytes(const ModelSpec& spec, const WeightFormats& formats) {
  return sum_bytes(spec, formats, false);
}
uint64_t LoadedWeights::host_bytes(const ModelSpec& spec, const WeightFormats& formats) {
  return sum_bytes(spec, formats, true);
}
uint64_t LoadedWeights::staging_bytes(const ModelSpec& spec, const WeightFormats& formats, bool cuda,
                                      int threads) {
  const uint64_t packing = formats.any_packed() ? threads * TensorSource::packing_bytes() : 0;
  return packing + (cuda ? staging_buffer_bytes(spec, formats) : 0);
}

LoadedWeights::LoadedWeights(Device& device, const ModelSpec& spec, const TensorSource& source,
                             const WeightFormats& formats, const Progress& progress)
    : device_(device),
      on_device_(device.allocate(device_bytes(spec, formats), "weights")),
      on_host_(device.allocate_host(host_bytes(spec, formats), "the embedding")) {
  Filler filler(device, source, formats.dtype, staging_buffer_bytes(spec, formats));
  std::byte* next_device = on_device_.data();
  std::byte* next_host = on_host_.data();
  const uint64_t total = on_device_.bytes() + on_host_.bytes();
  uint64_t done = 0;
  const std::vector<Weight> weights = list_weights(spec);
  for (size_t i = 0; i < weights.size(); ++i) {
    const Weight& weight = weights[i];
    const bool host = stays_on_host(weight);
    const bool staged = !host && device.is_cuda();
    std::byte*& next = host ? next_host : next_device;
    if (formats.of(weight) == SliceEncoding::dense) {
      filler.fill(weight, next, staged);
      tensors_[{weight.role, weight.layer}] = host ? host_view_of(next, weight.shape(), formats.dtype)
                                                   : view_of(next, weight.shape(), device, formats.dtype);
    } else if (padded_bytes(formats, weight) > 0) {
      PackedWeight packed = packed_form(formats, weight);
      packed.data = next;
      if (packed.is_ffn()) {
        filler.fill_ffn(weight, weights[i + 1], packed, next,
                        staged);  // down follows gate and up in the list
      } else {
        filler.fill_matrix(weight, packed, next, staged);
      }
      packed_[{weight.role, weight.layer}] = packed;
    }
    next += padded_bytes(formats, weight);
    done += padded_bytes(formats, weight);
    progress("loading weights", done, total);
  }
}

}  // namespace lighter::models
