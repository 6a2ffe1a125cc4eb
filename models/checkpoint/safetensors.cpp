// Invariant of an open file: its tensors, in order, cover the bytes after the header exactly: no gap,
// no overlap, nothing left at the end. The format demands it, so a file that differs is damaged.
#include "models/checkpoint/safetensors.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <string_view>
#include <tuple>
#include <utility>

#include "models/checkpoint/strict_json.h"
#include "runtime/error.h"

namespace lighter::models {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors bytes are used as they are stored");

using nlohmann::json;

constexpr std::uint64_t kLengthBytes = 8;
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the reference implementation
constexpr std::uint64_t kMaxElements = std::numeric_limits<std::int64_t>::max();
constexpr int kHeaderDepth = 2;  // {"name": {"shape": [...]}}
constexpr std::string_view kGitLfsPointer = "version https://git-lfs";

std::string number(std::uint64_t value) {
  return std::to_string(value);
}

// The member, if it is there and of the wanted kind; CheckpointError otherwise.
const json& member(const json& object, const char* key, json::value_t kind, const std::string& what) {
  const auto found = object.find(key);
  if (found == object.end()) throw CheckpointError(what + " has no \"" + key + "\" in the header");
  if (found->type() != kind)
    throw CheckpointError(what + ": \"" + key + "\" has the wrong type in the header");
  return *found;
}

void parse_shape(const json& shape, TensorInfo& tensor, const std::string& what) {
  std::uint64_t elements = 1;
  for (const json& dim : shape) {
    if (!dim.is_number_unsigned() || dim.get<std::uint64_t>() > kMaxElements) {
      throw CheckpointError(what + ": its shape holds something that is not a size");
    }
    tensor.shape.push_back(dim.get<std::int64_t>());
    if (__builtin_mul_overflow(elements, dim.get<std::uint64_t>(), &elements) || elements > kMaxElements) {
      throw CheckpointError(what + ": its shape has too many elements: " + shape_text(tensor.shape));
    }
  }
  tensor.elements = static_cast<std::int64_t>(elements);
}

// One entry of the header: {"dtype": "BF16", "shape": [16, 5120], "data_offsets": [begin, end]}.
TensorInfo parse_tensor(const std::string& name, const json& entry, std::uint64_t data_start,
                        const std::string& file) {
  const std::string what = file + ": tensor " + quote_name(name);
  if (!entry.is_object()) throw CheckpointError(what + " is not described by a JSON object");
  TensorInfo tensor;
  tensor.name = name;
  tensor.format_type = member(entry, "dtype", json::value_t::string, what).get<std::string>();
  tensor.type = type_from_safetensors_name(tensor.format_type);
  parse_shape(member(entry, "shape", json::value_t::array, what), tensor, what);

  const json& offsets = member(entry, "data_offsets", json::value_t::array, what);
  if (offsets.size() != 2 || !offsets[0].is_number_unsigned() || !offsets[1].is_number_unsigned()) {
    throw CheckpointError(what + ": \"data_offsets\" is not [begin, end]");
  }
  const auto begin = offsets[0].get<std::uint64_t>();
  const auto end = offsets[1].get<std::uint64_t>();
  const std::string range = "[" + number(begin) + ", " + number(end) + ")";
  if (begin > end || end > std::numeric_limits<std::uint64_t>::max() - data_start) {
    throw CheckpointError(what + ": impossible offsets " + range);
  }
  tensor.bytes = end - begin;
  tensor.file_offset = data_start + begin;

  // The size of an unknown type's element is not known, so its bytes cannot be checked.
  const std::uint64_t size = element_bytes(tensor.type);
  const auto elements = static_cast<std::uint64_t>(tensor.elements);
  std::uint64_t expected = 0;
  if (size != 0 && (__builtin_mul_overflow(elements, size, &expected) || expected != tensor.bytes)) {
    throw CheckpointError(what + ": shape " + shape_text(tensor.shape) + " of " + to_string(tensor.type) +
                          " needs " + number(elements) + " x " + number(size) + " bytes, but its offsets " +
                          range + " hold " + number(tensor.bytes));
  }
  return tensor;
}

// Puts the tensors into file order and checks the invariant at the top of this file.
void sort_and_check_coverage(std::vector<TensorInfo>& tensors, std::uint64_t data_start,
                             std::uint64_t file_bytes, const std::string& file) {
  std::sort(tensors.begin(), tensors.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return std::tie(a.file_offset, a.bytes, a.name) < std::tie(b.file_offset, b.bytes, b.name);
  });
  std::uint64_t covered = data_start;
  std::string previous;
  for (const TensorInfo& tensor : tensors) {
    if (tensor.file_offset < covered) {
      throw CheckpointError(file + ": tensors " + quote_name(previous) + " and " + quote_name(tensor.name) +
                            " overlap (from byte " + number(tensor.file_offset) +
                            "); the file is damaged, get it again");
    }
    if (tensor.file_offset > covered) {
      throw CheckpointError(file + ": the " + number(tensor.file_offset - covered) + " bytes before tensor " +
                            quote_name(tensor.name) +
                            " belong to no tensor, which the format forbids; get the file again");
    }
    covered += tensor.bytes;
    previous = tensor.name;
  }
  if (covered > file_bytes) {
    throw CheckpointError(file + " is truncated: expected " + number(covered) + " bytes, found " +
                          number(file_bytes) + " (tensor " + quote_name(previous) +
                          " ends beyond the end); get the file again");
  }
  if (covered < file_bytes) {
    throw CheckpointError(file + ": expected " + number(covered) + " bytes, found " + number(file_bytes) +
                          ": the bytes past the last tensor belong to none; get the file again");
  }
}

// The header's text, its length checked against the file.
std::string read_header(const ReadFile& file) {
  const std::string path = file.path().string();
  std::string start(std::min<std::uint64_t>(file.bytes(), kGitLfsPointer.size()), '\0');
  file.read_at(0, start.size(), start.data());
  if (start == kGitLfsPointer) {
    throw CheckpointError(path + " is a git-lfs pointer, not the weights; run `git lfs pull` in its folder");
  }
  if (file.bytes() < kLengthBytes) {
    throw CheckpointError(path + " is truncated: expected at least " + number(kLengthBytes) +
                          " bytes, found " + number(file.bytes()) + "; get the file again");
  }
  std::uint64_t header_bytes = 0;
  file.read_at(0, kLengthBytes, &header_bytes);
  if (header_bytes > kMaxHeaderBytes) {
    throw CheckpointError(path + " is not a safetensors file: its header would have " + number(header_bytes) +
                          " bytes (at most " + number(kMaxHeaderBytes) + " are allowed)");
  }
  if (header_bytes > file.bytes() - kLengthBytes) {
    throw CheckpointError(path + " is truncated within its header: expected at least " +
                          number(kLengthBytes + header_bytes) + " bytes, found " + number(file.bytes()) +
                          "; get the file again");
  }
  std::string header(header_bytes, '\0');
  file.read_at(kLengthBytes, header_bytes, header.data());
  return header;
}

}  // namespace

std::string shape_text(std::span<const std::int64_t> shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

SafetensorsFile::SafetensorsFile(std::filesystem::path path) : file_(std::move(path)) {
  const std::string file = file_.path().string();
  const std::string text = read_header(file_);
  const json header = parse_strict_json(text, file + ": header", kHeaderDepth);
  if (!header.is_object()) throw CheckpointError(file + ": header is not a JSON object");

  const std::uint64_t data_start = kLengthBytes + text.size();
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;  // free text of the program that wrote the file
    tensors_.push_back(parse_tensor(name, entry, data_start, file));
  }
  sort_and_check_coverage(tensors_, data_start, file_.bytes(), file);
}

void SafetensorsFile::read_bytes(const TensorInfo& tensor, std::uint64_t first, std::uint64_t count,
                                 void* dst) const {
  if (first > tensor.bytes || count > tensor.bytes - first) {
    throw CheckpointError("bytes [" + number(first) + ", " + number(first) + " + " + number(count) +
                          ") are not within tensor " + quote_name(tensor.name) + " of " +
                          number(tensor.bytes) + " bytes");
  }
  file_.read_at(tensor.file_offset + first, count, dst);
}

}  // namespace lighter::models
