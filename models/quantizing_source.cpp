#include "models/quantizing_source.h"

#include <tbb/parallel_for.h>

#include <cstring>

#include "runtime/float_convert.h"
#include "runtime/moe/slice_format.h"
#include "runtime/quant/quantize.h"

namespace lighter::models {
namespace {

constexpr int64_t kRowsAtOnce = 32;

}  // namespace

QuantizingSource::QuantizingSource(std::unique_ptr<TensorSource> source, const ModelSpec& spec, DType dtype,
                                   SliceEncoding encoding, int64_t slice_width, int threads)
    : source_(std::move(source)),
      spec_(spec),
      dtype_(dtype),
      encoding_(encoding),
      slice_width_(slice_width),
      arena_(threads) {}

uint64_t QuantizingSource::scratch_bytes(const ModelSpec& spec, DType dtype) {
  return dense_slice_bytes({spec.hidden, spec.expert_ffn}, dtype);
}

std::vector<std::byte> QuantizingSource::take_scratch() const {
  {
    std::lock_guard lock(mutex_);
    if (!free_scratch_.empty()) {
      auto scratch = std::move(free_scratch_.back());
      free_scratch_.pop_back();
      return scratch;
    }
  }
  return std::vector<std::byte>(scratch_bytes(spec_, dtype_));
}

void QuantizingSource::read_expert(ExpertId expert, std::span<std::byte* const> slices) const {
  std::vector<std::byte> scratch = take_scratch();
  const uint64_t dense_bytes = dense_slice_bytes({spec_.hidden, slice_width_}, dtype_);
  std::vector<std::byte*> dense;
  for (size_t i = 0; i < slices.size(); ++i) dense.push_back(scratch.data() + i * dense_bytes);
  source_->read_expert(expert, dense);
  for (size_t i = 0; i < slices.size(); ++i) quantize(dense[i], slices[i]);
  std::lock_guard lock(mutex_);
  free_scratch_.push_back(std::move(scratch));
}

// The arena keeps a loader that waits here from taking up another expert meanwhile.
void QuantizingSource::quantize(const std::byte* dense, std::byte* packed) const {
  const SlicePacker packer(encoding_, spec_.hidden, slice_width_, packed);
  const auto pack_matrix = [&](SliceMatrix matrix, int64_t rows, int64_t columns, const std::byte* from) {
    tbb::parallel_for(int64_t{0}, (rows + kRowsAtOnce - 1) / kRowsAtOnce, [&](int64_t block) {
      std::vector<float> row(columns);
      for (int64_t r = block * kRowsAtOnce; r < std::min(rows, (block + 1) * kRowsAtOnce); ++r) {
        const std::byte* at = from + r * columns * static_cast<int64_t>(dtype_size(dtype_));
        if (dtype_ == DType::fp32) {
          std::memcpy(row.data(), at, columns * sizeof(float));
        } else {
          bf16_to_fp32(reinterpret_cast<const uint16_t*>(at), row.data(), static_cast<size_t>(columns));
        }
        packer.pack_row(matrix, r, row.data());
      }
    });
  };
  const int64_t matrix_bytes = slice_width_ * spec_.hidden * static_cast<int64_t>(dtype_size(dtype_));
  arena_.execute([&] {
    pack_matrix(SliceMatrix::gate, slice_width_, spec_.hidden, dense);
    pack_matrix(SliceMatrix::up, slice_width_, spec_.hidden, dense + matrix_bytes);
    pack_matrix(SliceMatrix::down, spec_.hidden, slice_width_, dense + 2 * matrix_bytes);
  });
}

}  // namespace lighter::models
