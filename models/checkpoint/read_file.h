// A regular file that is read by position. Uses pread, never mmap: no page of it counts as this
// process's memory, and a file that shrinks while in use is an error rather than a signal.
#pragma once

#include <cstdint>
#include <filesystem>

namespace lighter::models {

// Owns the descriptor. Const methods are thread-safe. Move-only; a moved-from file can only be destroyed.
class ReadFile {
 public:
  // CheckpointError if path cannot be opened or is not a regular file.
  explicit ReadFile(std::filesystem::path path);
  ReadFile(ReadFile&& other) noexcept;
  ReadFile& operator=(ReadFile&&) = delete;
  ~ReadFile();

  const std::filesystem::path& path() const { return path_; }
  // Size when it was opened.
  std::uint64_t bytes() const { return bytes_; }

  // Fills dst with bytes [offset, offset + count); CheckpointError if the file ends before or fails.
  void read_at(std::uint64_t offset, std::uint64_t count, void* dst) const;

 private:
  std::filesystem::path path_;
  int fd_ = -1;
  std::uint64_t bytes_ = 0;
};

}  // namespace lighter::models
