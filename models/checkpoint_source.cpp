#include "models/checkpoint_source.h"

#include <algorithm>
#include <array>
#include <set>

#include "runtime/error.h"

namespace lighter::models {
namespace {

constexpr int64_t kBlockRows = 64;  // of a matrix that is transposed or cut: the scratch is one block

// Where the parts of a packed slice lie (runtime/moe/slice_format.h).
template <typename Element>
struct SliceParts {
  SliceParts(std::byte* slice, int64_t hidden, int64_t width)
      : gate(reinterpret_cast<Element*>(slice)), up(gate + width * hidden), down(up + width * hidden) {}
  Element* gate;  // [width, hidden]
  Element* up;    // [width, hidden]
  Element* down;  // [hidden, width]
};

template <typename Element>
class ExpertReader {
 public:
  ExpertReader(const Checkpoint& checkpoint, const ModelSpec& spec, DType dtype, int64_t width,
               std::span<std::byte* const> slices)
      : checkpoint_(checkpoint), dtype_(dtype), hidden_(spec.hidden), ffn_(spec.expert_ffn), width_(width) {
    for (std::byte* slice : slices) slices_.emplace_back(slice, hidden_, width_);
  }

  // gate_up [experts, hidden, 2·ffn] and down [experts, ffn, hidden]: both are turned.
  void read_fused(const std::string& gate_up, const std::string& down, int64_t expert) {
    for_blocks(gate_up, expert * hidden_, hidden_, 2 * ffn_,
               [&](int64_t row, int64_t rows, const Element* block) {
                 for (int64_t column = 0; column < 2 * ffn_; ++column) {
                   const int64_t f = column % ffn_;
                   const auto& slice = slices_[f / width_];
                   Element* to = (column < ffn_ ? slice.gate : slice.up) + (f % width_) * hidden_ + row;
                   for (int64_t i = 0; i < rows; ++i) to[i] = block[i * 2 * ffn_ + column];
                 }
               });
    for_blocks(down, expert * ffn_, ffn_, hidden_, [&](int64_t row, int64_t rows, const Element* block) {
      for (int64_t h = 0; h < hidden_; ++h) {
        for (int64_t i = 0; i < rows; ++i) {
          const int64_t f = row + i;
          slices_[f / width_].down[h * width_ + f % width_] = block[i * hidden_ + h];
        }
      }
    });
  }

  // gate, up [ffn, hidden] are cut by rows, down [hidden, ffn] by columns.
  void read_separate(const std::string& gate, const std::string& up, const std::string& down) {
    for (int64_t i = 0; i < static_cast<int64_t>(slices_.size()); ++i) {
      const int64_t count = width_ * hidden_;
      checkpoint_.read(gate, i * count, count, dtype_, slices_[i].gate);
      checkpoint_.read(up, i * count, count, dtype_, slices_[i].up);
    }
    for_blocks(down, 0, hidden_, ffn_, [&](int64_t row, int64_t rows, const Element* block) {
      for (int64_t i = 0; i < rows; ++i) {
        for (size_t s = 0; s < slices_.size(); ++s) {
          std::copy_n(block + i * ffn_ + static_cast<int64_t>(s) * width_, width_,
                      slices_[s].down + (row + i) * width_);
        }
      }
    });
  }

 private:
  // Rows [0, rows) of a matrix that begins at first_row of the tensor, a block at a time.
  template <typename Use>
  void for_blocks(const std::string& name, int64_t first_row, int64_t rows, int64_t columns, Use use) {
    block_.resize(kBlockRows * columns);
    for (int64_t row = 0; row < rows; row += kBlockRows) {
      const int64_t count = std::min(kBlockRows, rows - row);
      checkpoint_.read(name, (first_row + row) * columns, count * columns, dtype_, block_.data());
      use(row, count, block_.data());
    }
  }

  const Checkpoint& checkpoint_;
  const DType dtype_;
  const int64_t hidden_, ffn_, width_;
  std::vector<SliceParts<Element>> slices_;
  std::vector<Element> block_;
};

}  // namespace

CheckpointSource::CheckpointSource(const std::filesystem::path& dir, const ModelSpec& spec, DType dtype,
                                   int64_t slice_width, std::optional<StoredFormats> stored)
    : spec_(spec),
      dtype_(dtype),
      slice_width_(slice_width),
      stored_(std::move(stored)),
      checkpoint_(Checkpoint::open(dir)) {
  for (int i = 0; i < static_cast<int>(spec.layers.size()); ++i) {
    if (spec.layers[i].moe_layer >= 0) decoder_layer_.push_back(i);
  }
  check_names(dir);
}

void CheckpointSource::check_names(const std::filesystem::path& dir) const {
  std::set<std::string> expected;
  for (const FolderTensor& tensor : folder_tensors(spec_, stored_ ? &*stored_ : nullptr)) {
    if (tensor.packed) {
      checkpoint_.expect_bytes(tensor.name, tensor.shape);
    } else {
      checkpoint_.expect(tensor.name, tensor.shape);
    }
    expected.insert(tensor.name);
  }
  if (spec_.tied_head) expected.insert(spec_.names.head);  // Some folders store the tied head a second time.
  for (const std::string& name : checkpoint_.names()) {
    const bool vision = name.starts_with("vision_model.") || name.starts_with("multi_modal_projector.");
    if (vision || expected.contains(name) || name.ends_with("rotary_emb.inv_freq")) continue;
    throw CheckpointError(
        dir.string() + ": tensor '" + name + "' has no place in a " + spec_.architecture + " of " +
        std::to_string(spec_.layers.size()) +
        " layers; config.json and weights do not belong together, or the model has parts that "
        "are not supported");
  }
}

void CheckpointSource::read(const TensorPart& part, int64_t first, int64_t count, DType dtype,
                            void* to) const {
  checkpoint_.read(part.name, first, count, dtype, to);
}

void CheckpointSource::read_expert(ExpertId expert, std::span<std::byte* const> slices) const {
  const int layer = decoder_layer_[expert.layer];
  if (experts_packed()) {
    const uint64_t bytes = packed_slice_bytes(stored_->experts, spec_.hidden, slice_width_);
    for (size_t i = 0; i < slices.size(); ++i) {
      checkpoint_.read_bytes(packed_experts_name(layer), (expert.expert * slices.size() + i) * bytes, bytes,
                             slices[i]);
    }
    return;
  }
  const auto read_as = [&](auto element) {
    ExpertReader<decltype(element)> reader(checkpoint_, spec_, dtype_, slice_width_, slices);
    const auto name = [&](const std::string& pattern) { return fill_name(pattern, layer, expert.expert); };
    const auto& names = spec_.names;
    if (names.layout == ExpertLayout::fused_in_out) {
      reader.read_fused(name(names.experts_gate), name(names.experts_down), expert.expert);
    } else {
      reader.read_separate(name(names.experts_gate), name(names.experts_up), name(names.experts_down));
    }
  };
  if (dtype_ == DType::fp32) {
    read_as(uint32_t{});
  } else {
    read_as(uint16_t{});
  }
}

void CheckpointSource::read_packed_rows(const Weight& weight, SliceEncoding encoding, int64_t first,
                                        int64_t count, const PackedRowsTarget& to) const {
  if (!stored_) return TensorSource::read_packed_rows(weight, encoding, first, count, to);
  const std::string name = packed_name(weight);
  const PackedMatrix matrix = packed_form(stored_->weights, weight).matrix();
  const int64_t groups = matrix.columns / group_size(encoding);
  const int64_t row_bytes = value_bytes(encoding, matrix.columns);
  const auto read = [&](uint64_t at, int64_t row, void* into) {
    checkpoint_.read_bytes(name, at + static_cast<uint64_t>(first * row), static_cast<uint64_t>(count * row),
                           into);
  };
  read(matrix.values_at, row_bytes, to.values);
  read(matrix.scales_at, groups * 2, to.scales);
  if (encoding == SliceEncoding::int4) read(matrix.minimums_at, groups * 2, to.minimums);
}

void CheckpointSource::read_packed_slices(const Weight& gate_up, const Weight& down, const PackedWeight& form,
                                          int64_t first, int64_t count, std::byte* to) const {
  if (!stored_) return TensorSource::read_packed_slices(gate_up, down, form, first, count, to);
  const uint64_t bytes = form.slice_bytes();
  checkpoint_.read_bytes(packed_name(gate_up), static_cast<uint64_t>(first) * bytes,
                         static_cast<uint64_t>(count) * bytes, to);
}

}  // namespace lighter::models
