#include "models/checkpoint/checkpoint.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <memory>
#include <numeric>
#include <utility>

#include "models/checkpoint/model_folder.h"
#include "models/checkpoint/nearest_names.h"
#include "models/checkpoint/strict_json.h"
#include "runtime/error.h"
#include "runtime/float_convert.h"

namespace lighter::models {
namespace {

bool is_convertible(StoredType type) {
  return type == StoredType::fp32 || type == StoredType::fp16 || type == StoredType::bf16;
}

void check_convertible(const TensorInfo& tensor, const std::string& file) {
  if (is_convertible(tensor.type)) return;
  std::string type = to_string(tensor.type);
  if (tensor.type == StoredType::other) type = quote_name(tensor.format_type);
  if (tensor.type == StoredType::fp8_e4m3 || tensor.type == StoredType::fp8_e5m2) type = "fp8";
  throw CheckpointError("tensor " + quote_name(tensor.name) + " in " + file + ": " + type +
                        " weights are not supported yet; use the bf16 checkpoint");
}

// src: count stored elements of a type that differs from dst_type.
void convert(StoredType src_type, const void* src, DType dst_type, void* dst, std::size_t count) {
  const auto* halves = static_cast<const std::uint16_t*>(src);
  if (dst_type == DType::fp32) {
    auto* out = static_cast<float*>(dst);
    src_type == StoredType::bf16 ? bf16_to_fp32(halves, out, count) : fp16_to_fp32(halves, out, count);
  } else {
    auto* out = static_cast<std::uint16_t*>(dst);
    src_type == StoredType::fp16 ? fp16_to_bf16(halves, out, count)
                                 : fp32_to_bf16(static_cast<const float*>(src), out, count);
  }
}

// Every tensor that the index places in a shard must be in that shard.
void check_against_index(const std::map<std::string, std::string>& weight_map, const Checkpoint& checkpoint,
                         const std::vector<std::string>& file_names, const std::string& dir) {
  std::string first;
  std::size_t count = 0;
  for (const auto& [name, file] : weight_map) {
    const bool there = checkpoint.contains(name) && file_names[checkpoint.info(name).file] == file;
    if (!there && count++ == 0) first = quote_name(name) + " in " + file;
  }
  if (count == 0) return;
  throw CheckpointError("the index of " + dir + " places tensor " + first +
                        (count == 1 ? "" : " (and " + std::to_string(count - 1) + " more)") +
                        ", but that file does not hold it; index and shards are of different versions, get "
                        "both again");
}

}  // namespace

Checkpoint Checkpoint::open(const std::filesystem::path& dir) {
  const ModelFolder folder = inspect_model_folder(dir);
  Checkpoint checkpoint;
  checkpoint.dir_ = dir;
  checkpoint.open_files(folder.files);
  checkpoint.collect_tensors();
  check_against_index(folder.weight_map, checkpoint, folder.files, dir.string());
  return checkpoint;
}

void Checkpoint::open_files(const std::vector<std::string>& file_names) {
  files_.reserve(file_names.size());
  for (const std::string& name : file_names) files_.emplace_back(dir_ / name);
}

void Checkpoint::collect_tensors() {
  for (std::size_t file = 0; file < files_.size(); ++file) {
    for (TensorInfo tensor : files_[file].tensors()) {
      tensor.file = file;
      tensors_.push_back(std::move(tensor));
    }
  }
  std::sort(tensors_.begin(), tensors_.end(),
            [](const TensorInfo& a, const TensorInfo& b) { return a.name < b.name; });
  const auto same_name = [](const TensorInfo& a, const TensorInfo& b) { return a.name == b.name; };
  const auto twice = std::adjacent_find(tensors_.begin(), tensors_.end(), same_name);
  if (twice != tensors_.end()) {
    throw CheckpointError(
        "tensor " + quote_name(twice->name) + " is in two files: " + files_[twice->file].path().string() +
        " and " + files_[std::next(twice)->file].path().string() + "; keep the shards of one model only");
  }
  names_.reserve(tensors_.size());
  for (const TensorInfo& tensor : tensors_) names_.push_back(tensor.name);
}

const TensorInfo* Checkpoint::find(std::string_view name) const {
  const auto found = std::lower_bound(names_.begin(), names_.end(), name);
  if (found == names_.end() || *found != name) return nullptr;
  return &tensors_[static_cast<std::size_t>(found - names_.begin())];
}

bool Checkpoint::contains(std::string_view name) const {
  return find(name) != nullptr;
}

const TensorInfo& Checkpoint::info(std::string_view name) const {
  if (const TensorInfo* tensor = find(name)) return *tensor;
  std::string message = "there is no tensor " + quote_name(name) + " in " + dir_.string() + " (of " +
                        std::to_string(names_.size()) + " tensors)";
  const std::vector<std::string> nearest = nearest_names(name, names_, 3);
  for (std::size_t i = 0; i < nearest.size(); ++i) {
    message += (i == 0 ? "; the nearest names are " : ", ") + quote_name(nearest[i]);
  }
  throw CheckpointError(message);
}

std::uint64_t Checkpoint::total_bytes() const {
  return std::accumulate(tensors_.begin(), tensors_.end(), std::uint64_t{0},
                         [](std::uint64_t sum, const TensorInfo& tensor) { return sum + tensor.bytes; });
}

void Checkpoint::check_shape(const TensorInfo& tensor, std::span<const std::int64_t> shape) const {
  if (std::equal(shape.begin(), shape.end(), tensor.shape.begin(), tensor.shape.end())) return;
  throw CheckpointError("tensor " + quote_name(tensor.name) + " in " + files_[tensor.file].path().string() +
                        " has shape " + shape_text(tensor.shape) + ", but the model needs " +
                        shape_text(shape) + "; config.json and weights are of different models");
}

void Checkpoint::expect(std::string_view name, std::span<const std::int64_t> shape) const {
  const TensorInfo& tensor = info(name);
  check_convertible(tensor, files_[tensor.file].path().string());
  check_shape(tensor, shape);
}

void Checkpoint::expect_bytes(std::string_view name, std::span<const std::int64_t> shape) const {
  const TensorInfo& tensor = info(name);
  if (tensor.type != StoredType::uint8) {
    throw CheckpointError("tensor " + quote_name(name) + " in " + files_[tensor.file].path().string() +
                          " holds " + to_string(tensor.type) +
                          ", but must hold bytes; write the folder anew");
  }
  check_shape(tensor, shape);
}

void Checkpoint::read_bytes(std::string_view name, std::uint64_t first, std::uint64_t count,
                            void* dst) const {
  const TensorInfo& tensor = info(name);
  files_[tensor.file].read_bytes(tensor, first, count, dst);
}

void Checkpoint::read(std::string_view name, std::int64_t first, std::int64_t count, DType dst_type,
                      void* dst) const {
  if (dst_type == DType::fp16) throw CheckpointError("tensors are read as fp32 or bf16, not as fp16");
  const TensorInfo& tensor = info(name);
  const SafetensorsFile& file = files_[tensor.file];
  check_convertible(tensor, file.path().string());
  if (first < 0 || count < 0 || first > tensor.elements || count > tensor.elements - first) {
    throw CheckpointError("elements [" + std::to_string(first) + ", " + std::to_string(first) + " + " +
                          std::to_string(count) + ") are not within tensor " + quote_name(name) +
                          " of shape " + shape_text(tensor.shape));
  }
  const std::uint64_t src_size = element_bytes(tensor.type);
  auto position = static_cast<std::uint64_t>(first) * src_size;
  auto left = static_cast<std::uint64_t>(count);
  const bool as_stored = (tensor.type == StoredType::fp32 && dst_type == DType::fp32) ||
                         (tensor.type == StoredType::bf16 && dst_type == DType::bf16);
  if (as_stored) {
    file.read_bytes(tensor, position, left * src_size, dst);
    return;
  }
  const std::uint64_t dst_size = dtype_size(dst_type);
  const std::uint64_t step = std::min<std::uint64_t>(left, kScratchBytes / src_size);
  const auto scratch = std::make_unique_for_overwrite<std::byte[]>(step * src_size);
  auto* out = static_cast<std::byte*>(dst);
  while (left > 0) {
    const std::uint64_t now = std::min(left, step);
    file.read_bytes(tensor, position, now * src_size, scratch.get());
    convert(tensor.type, scratch.get(), dst_type, out, now);
    position += now * src_size;
    out += now * dst_size;
    left -= now;
  }
}

}  // namespace lighter::models
