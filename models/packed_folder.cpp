#include "models/packed_folder.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <system_error>

#include "runtime/error.h"

namespace lighter::models {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kCopyBytes = uint64_t{16} << 20;

// What else a model folder needs to be used, and its terms.
bool goes_along(const std::string& name) {
  for (const char* whole :
       {"generation_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"}) {
    if (name == whole) return true;
  }
  for (const char* begin : {"tokenizer", "chat_template", "LICENSE", "USE_POLICY", "NOTICE"}) {
    if (name.starts_with(begin)) return true;
  }
  return false;
}

std::string shard_name(int number, int of) {
  char name[48];
  std::snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", number, of);
  return name;
}

// Absolute, without "." and a slash at its end.
fs::path whole_path(const fs::path& dir) {
  if (dir.empty()) throw ConfigError("the folder to write has no name");
  const fs::path path = fs::absolute(dir).lexically_normal();
  return path.has_filename() ? path : path.parent_path();
}

}  // namespace

PackedFolderWriter::PackedFolderWriter(const fs::path& dir, fs::path from, const CheckpointSource& source,
                                       const ModelSpec& spec, StoredFormats formats)
    : dir_(whole_path(dir)),
      partial_(dir_.string() + ".partial"),
      from_(std::move(from)),
      source_(source),
      spec_(spec),
      formats_(std::move(formats)),
      files_(static_cast<int>(spec.layers.size()) + 1) {
  std::error_code error;
  for (const fs::path& taken : {dir_, partial_}) {
    // A link that leads nowhere counts, too.
    if (fs::exists(fs::symlink_status(taken, error))) {
      throw ConfigError(taken.string() + " is there already; remove it, or give another folder");
    }
  }
  if (!fs::create_directories(partial_, error)) {
    throw ConfigError("the folder " + partial_.string() +
                      " cannot be made: " + (error ? error.message() : "somebody else has just made it"));
  }
}

PackedFolderWriter::~PackedFolderWriter() {
  if (finished_) return;
  writer_.reset();
  std::error_code ignored;
  fs::remove_all(partial_, ignored);
}

void PackedFolderWriter::begin(int layer) {
  layer_ = layer;
  copies_.clear();
  const std::string file = shard_name(++file_, files_);
  writer_.emplace(partial_ / file);
  for (const FolderTensor& tensor : folder_tensors(spec_, &formats_)) {
    if (tensor.layer != layer) continue;
    weight_map_[tensor.name] = file;
    if (tensor.packed) {
      writer_->declare(tensor.name, StoredType::uint8, tensor.shape);
    } else {
      copies_.push_back(tensor.name);
    }
  }
  for (const std::string& name : copies_) {
    const TensorInfo& tensor = source_.checkpoint().info(name);
    writer_->declare(name, tensor.type, tensor.shape);
  }
}

uint64_t PackedFolderWriter::copied_bytes() const {
  uint64_t bytes = 0;
  for (const FolderTensor& tensor : folder_tensors(spec_, &formats_)) {
    if (!tensor.packed) bytes += source_.checkpoint().info(tensor.name).bytes;
  }
  return bytes;
}

void PackedFolderWriter::put(const Weight& weight, const std::byte* bytes, uint64_t count) {
  writer_->append(packed_name(weight), bytes, count);
}

void PackedFolderWriter::put_expert(const std::byte* slices, uint64_t count) {
  writer_->append(packed_experts_name(layer_), slices, count);
}

void PackedFolderWriter::end(const std::function<void(uint64_t bytes)>& copied) {
  const auto buffer = std::make_unique_for_overwrite<std::byte[]>(kCopyBytes);
  for (const std::string& name : copies_) {
    const uint64_t bytes = source_.checkpoint().info(name).bytes;
    for (uint64_t first = 0; first < bytes; first += kCopyBytes) {
      const uint64_t count = std::min(kCopyBytes, bytes - first);
      source_.checkpoint().read_bytes(name, first, count, buffer.get());
      writer_->append(name, buffer.get(), count);
      copied(count);
    }
  }
  writer_->finish();
  written_bytes_ += writer_->declared_bytes();
  writer_.reset();
}

void PackedFolderWriter::finish() {
  write_safetensors_index(partial_, weight_map_, written_bytes_);
  std::ifstream in(from_ / "config.json");
  nlohmann::ordered_json config = nlohmann::ordered_json::parse(in);
  config["quantization_config"] = stored_formats_entry(formats_, spec_);
  std::ofstream out(partial_ / "config.json");
  out << config.dump(2) << "\n";
  out.close();
  if (!out) throw CheckpointError((partial_ / "config.json").string() + " cannot be written");
  for (const auto& entry : fs::directory_iterator(from_)) {
    const std::string name = entry.path().filename().string();
    if (!entry.is_regular_file() || !goes_along(name)) continue;
    std::error_code error;
    if (!fs::copy_file(entry.path(), partial_ / name, error)) {
      throw CheckpointError((partial_ / name).string() + " cannot be written: " + error.message());
    }
  }
  std::error_code error;
  fs::rename(partial_, dir_, error);
  finished_ = true;  // and stays, under whichever name
  if (error) {
    throw CheckpointError(partial_.string() + " is whole, but cannot be renamed to " + dir_.string() + ": " +
                          error.message());
  }
}

}  // namespace lighter::models
