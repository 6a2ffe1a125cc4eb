#include "models/checkpoint/safetensors_writer.h"

#include <algorithm>
#include <cerrno>
#include <nlohmann/json.hpp>
#include <system_error>
#include <utility>

#include "models/checkpoint/safetensors.h"
#include "models/checkpoint/strict_json.h"
#include "runtime/error.h"

namespace lighter::models {

using nlohmann::json;

SafetensorsWriter::SafetensorsWriter(std::filesystem::path path) : path_(std::move(path)), partial_(path_) {
  partial_ += ".partial";
  out_.open(partial_, std::ios::binary | std::ios::trunc);
  if (!out_)
    throw CheckpointError("cannot create " + partial_.string() + ": " +
                          std::generic_category().message(errno));
}

SafetensorsWriter::~SafetensorsWriter() {
  if (finished_) return;
  out_.close();
  std::error_code ignored;  // nothing to be done about a file that cannot be removed
  std::filesystem::remove(partial_, ignored);
}

void SafetensorsWriter::declare(std::string name, StoredType type, std::vector<std::int64_t> shape) {
  if (header_written_)
    throw CheckpointError("tensor " + quote_name(name) + " is declared after the first append");
  const auto same_name = [&](const Declared& tensor) { return tensor.name == name; };
  if (std::any_of(tensors_.begin(), tensors_.end(), same_name) || name == "__metadata__") {
    throw CheckpointError("tensor name " + quote_name(name) + " is taken");
  }
  const std::uint64_t size = element_bytes(type);
  if (size == 0) throw CheckpointError("tensor " + quote_name(name) + ": its type cannot be written");
  std::uint64_t bytes = size;
  for (const std::int64_t dim : shape) {
    if (dim < 0 || __builtin_mul_overflow(bytes, static_cast<std::uint64_t>(dim), &bytes)) {
      throw CheckpointError("tensor " + quote_name(name) + " has the impossible shape " + shape_text(shape));
    }
  }
  if (declared_bytes_ % size != 0) {
    throw CheckpointError("tensor " + quote_name(name) + " would start at byte " +
                          std::to_string(declared_bytes_) + ", not a multiple of " + to_string(type) + "'s " +
                          std::to_string(size) + " bytes; declare tensors of wider types first");
  }
  tensors_.push_back({std::move(name), type, std::move(shape), declared_bytes_, declared_bytes_ + bytes});
  declared_bytes_ += bytes;
}

void SafetensorsWriter::append(std::string_view name, const void* bytes, std::uint64_t count) {
  if (finished_) throw CheckpointError(path_.string() + " is already finished");
  if (!header_written_) write_header();
  // An empty tensor may be appended to or left out.
  if (count == 0) return;
  skip_complete();
  if (current_ == tensors_.size() || tensors_[current_].name != name) {
    throw CheckpointError(
        "cannot append to tensor " + quote_name(name) + ": the next one is " +
        (current_ == tensors_.size() ? "none, all are complete" : quote_name(tensors_[current_].name)));
  }
  const std::uint64_t missing = tensors_[current_].end - appended_bytes_;
  if (count > missing) {
    throw CheckpointError("cannot append " + std::to_string(count) + " bytes to tensor " + quote_name(name) +
                          ": only " + std::to_string(missing) + " are missing");
  }
  write(bytes, count);
  appended_bytes_ += count;
}

void SafetensorsWriter::finish() {
  if (finished_) throw CheckpointError(path_.string() + " is already finished");
  if (!header_written_) write_header();
  skip_complete();
  if (current_ != tensors_.size()) {
    throw CheckpointError("cannot finish " + path_.string() + ": tensor " +
                          quote_name(tensors_[current_].name) + " still misses " +
                          std::to_string(tensors_[current_].end - appended_bytes_) + " bytes");
  }
  out_.close();
  if (!out_)
    throw CheckpointError("writing " + partial_.string() +
                          " failed: " + std::generic_category().message(errno));
  std::error_code error;
  std::filesystem::rename(partial_, path_, error);
  if (error) throw CheckpointError("cannot rename " + partial_.string() + ": " + error.message());
  finished_ = true;
}

void SafetensorsWriter::skip_complete() {
  while (current_ < tensors_.size() && tensors_[current_].end == appended_bytes_) ++current_;
}

void SafetensorsWriter::write_header() {
  json header;
  header["__metadata__"] = {{"format", "pt"}};  // transformers refuses files without it
  for (const Declared& tensor : tensors_) {
    header[tensor.name] = {{"dtype", safetensors_name(tensor.type)},
                           {"shape", tensor.shape},
                           {"data_offsets", {tensor.begin, tensor.end}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // so that the tensors start at a multiple of 8
  const std::uint64_t bytes = text.size();
  write(&bytes, sizeof(bytes));
  write(text.data(), text.size());
  header_written_ = true;
}

void SafetensorsWriter::write(const void* bytes, std::uint64_t count) {
  if (!out_.write(static_cast<const char*>(bytes), static_cast<std::streamsize>(count))) {
    throw CheckpointError("writing " + std::to_string(count) + " bytes to " + partial_.string() +
                          " failed: " + std::generic_category().message(errno));
  }
}

void write_safetensors_index(const std::filesystem::path& dir,
                             const std::map<std::string, std::string>& weight_map,
                             std::uint64_t tensor_bytes) {
  const std::filesystem::path path = dir / "model.safetensors.index.json";
  json index;
  index["metadata"] = {{"total_size", tensor_bytes}};
  index["weight_map"] = weight_map;
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out << index.dump(2) << '\n';
  out.close();
  if (!out)
    throw CheckpointError("cannot write " + path.string() + ": " + std::generic_category().message(errno));
}

}  // namespace lighter::models
