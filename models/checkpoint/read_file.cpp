#include "models/checkpoint/read_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <system_error>
#include <utility>

#include "runtime/error.h"

namespace lighter::models {
namespace {

std::string reason(int error) {
  return std::generic_category().message(error);
}

}  // namespace

ReadFile::ReadFile(std::filesystem::path path) : path_(std::move(path)) {
  // Checked first: opening a pipe would wait for a writer.
  std::error_code error;
  const auto status = std::filesystem::status(path_, error);
  if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status)) {
    throw CheckpointError(path_.string() + " is not a regular file");
  }
  fd_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd_ < 0) throw CheckpointError("cannot open " + path_.string() + ": " + reason(errno));
  struct stat info = {};
  if (::fstat(fd_, &info) != 0) {
    const int failure = errno;
    ::close(fd_);
    throw CheckpointError("cannot read the size of " + path_.string() + ": " + reason(failure));
  }
  bytes_ = static_cast<std::uint64_t>(info.st_size);
}

ReadFile::ReadFile(ReadFile&& other) noexcept
    : path_(std::move(other.path_)), fd_(std::exchange(other.fd_, -1)), bytes_(other.bytes_) {}

ReadFile::~ReadFile() {
  if (fd_ >= 0) ::close(fd_);
}

void ReadFile::read_at(std::uint64_t offset, std::uint64_t count, void* dst) const {
  constexpr std::uint64_t most_per_call = 1u << 30;  // Linux reads at most 2 GiB at once
  auto* out = static_cast<char*>(dst);
  while (count > 0) {
    const auto want = static_cast<std::size_t>(std::min(count, most_per_call));
    const ::ssize_t got = ::pread(fd_, out, want, static_cast<::off_t>(offset));
    if (got < 0) {
      if (errno == EINTR) continue;
      throw CheckpointError("reading " + std::to_string(want) + " bytes at " + std::to_string(offset) +
                            " of " + path_.string() + " failed: " + reason(errno));
    }
    if (got == 0) {
      throw CheckpointError(path_.string() + " ends at byte " + std::to_string(offset) + ", but " +
                            std::to_string(count) + " more were expected (it had " + std::to_string(bytes_) +
                            " bytes when it was opened)");
    }
    out += got;
    offset += static_cast<std::uint64_t>(got);
    count -= static_cast<std::uint64_t>(got);
  }
}

}  // namespace lighter::models
