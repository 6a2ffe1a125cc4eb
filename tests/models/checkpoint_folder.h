// Makes small model folders for tests, whole or damaged, and catches the errors that they provoke.
#pragma once

#include <doctest/doctest.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <random>
#include <string>
#include <system_error>
#include <vector>

#include "models/checkpoint/checkpoint.h"
#include "models/checkpoint/safetensors_writer.h"
#include "runtime/error.h"

namespace lighter::models::testing {

namespace fs = std::filesystem;

// A folder of its own for each test, removed at its end.
class TempFolder {
 public:
  TempFolder() {
    static std::atomic<int> next = 0;
    path_ = fs::temp_directory_path() /
            ("lighter_checkpoint_" + std::to_string(::getpid()) + "_" + std::to_string(next++));
    fs::create_directories(path_);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  ~TempFolder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  const fs::path& path() const { return path_; }
  fs::path operator/(const std::string& name) const { return path_ / name; }

 private:
  fs::path path_;
};

inline void write_text(const fs::path& path, const std::string& text) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out << text;
}

// A safetensors file whose header is `header`, followed by data_bytes zeros.
inline void write_raw(const fs::path& path, const std::string& header, std::size_t data_bytes) {
  const std::uint64_t length = header.size();
  std::string text(8, '\0');
  std::memcpy(text.data(), &length, 8);
  write_text(path, text + header + std::string(data_bytes, '\0'));
}

struct TestTensor {
  std::string name;
  StoredType type;
  std::vector<std::int64_t> shape;
  std::vector<std::uint8_t> bytes;
};

inline TestTensor test_tensor(const std::string& name, StoredType type,
                              const std::vector<std::int64_t>& shape, unsigned seed = 1) {
  TestTensor tensor{name, type, shape, {}};
  std::uint64_t count = element_bytes(type);
  for (const std::int64_t dim : shape) count *= static_cast<std::uint64_t>(dim);
  std::mt19937 random(seed);
  tensor.bytes.resize(count);
  for (auto& byte : tensor.bytes) byte = static_cast<std::uint8_t>(random());
  return tensor;
}

inline void write_file(const fs::path& path, const std::vector<TestTensor>& tensors) {
  SafetensorsWriter writer(path);
  for (const auto& tensor : tensors) writer.declare(tensor.name, tensor.type, tensor.shape);
  for (const auto& tensor : tensors) writer.append(tensor.name, tensor.bytes.data(), tensor.bytes.size());
  writer.finish();
}

// Two shards: "a" and "b" in the first, "c" in the second.
inline void write_sharded(const TempFolder& dir) {
  write_file(dir / "model-1.safetensors",
             {test_tensor("a", StoredType::fp32, {2, 3}), test_tensor("b", StoredType::bf16, {4})});
  write_file(dir / "model-2.safetensors", {test_tensor("c", StoredType::fp16, {5})});
  write_safetensors_index(
      dir.path(), {{"a", "model-1.safetensors"}, {"b", "model-1.safetensors"}, {"c", "model-2.safetensors"}},
      42);
}

// Runs action, which must throw CheckpointError, and returns the message.
inline std::string message_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const CheckpointError& error) {
    return error.what();
  }
  FAIL("no CheckpointError");
  return {};
}

inline std::string open_error(const TempFolder& dir) {
  return message_of([&] { Checkpoint::open(dir.path()); });
}

// The error of a folder whose only weights are one file with this header and this much data.
inline std::string header_error(const std::string& header, std::size_t data_bytes) {
  const TempFolder dir;
  write_raw(dir / "model.safetensors", header, data_bytes);
  return open_error(dir);
}

inline bool has(const std::string& text, const std::string& part) {
  const bool found = text.find(part) != std::string::npos;
  if (!found) MESSAGE("not \"" << part << "\" in: " << text);
  return found;
}

}  // namespace lighter::models::testing
