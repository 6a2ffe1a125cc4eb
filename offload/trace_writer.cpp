#include <spdlog/spdlog.h>

#include <cstring>
#include <nlohmann/json.hpp>

#include "offload/trace.h"
#include "offload/trace_format.h"
#include "runtime/error.h"

namespace lighter::offload {
namespace {

using namespace trace_format;

std::string header_json(const TraceHeader& header) {
  const nlohmann::ordered_json json = {{"model", header.model},
                                       {"dtype", header.dtype},
                                       {"layers", header.layers},
                                       {"experts", header.experts},
                                       {"experts_per_token", header.experts_per_token},
                                       {"slices", header.slices},
                                       {"slice_bytes", header.slice_bytes},
                                       {"depths", header.depths}};
  return json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

}  // namespace

TraceWriter::TraceWriter(std::filesystem::path file, const TraceHeader& header)
    : file_(std::move(file)),
      part_(file_.string() + ".part"),
      layout_(header),
      out_(part_, std::ios::binary | std::ios::trunc),
      checksum_(kChecksumBegin) {
  if (!out_) throw ConfigError(part_.string() + " cannot be written; is its folder there?");
  const std::string json = header_json(header);
  const uint32_t numbers[] = {kVersion, static_cast<uint32_t>(json.size())};
  put(kMagic, kMagicBytes);
  put(numbers, sizeof numbers);
  put(json.data(), json.size());
}

TraceWriter::~TraceWriter() {
  if (finished_) return;
  out_.close();
  std::error_code error;
  std::filesystem::remove(part_, error);
  if (error) spdlog::warn("{} could not be removed: {}", part_.string(), error.message());
}

void TraceWriter::write(std::span<const uint32_t> positions, std::span<const uint16_t> values) {
  std::vector<char> record(4 + 2 * layout_.values());
  for (size_t i = 0; i < positions.size(); ++i) {
    std::memcpy(record.data(), &positions[i], 4);
    std::memcpy(record.data() + 4, &values[i * layout_.values()], record.size() - 4);
    checksum_ = checksum(checksum_, record.data(), record.size());
    put(record.data(), record.size());
  }
  tokens_ += positions.size();
}

void TraceWriter::finish() {
  put(kEnd, kMagicBytes);
  put(&tokens_, sizeof tokens_);
  put(&checksum_, sizeof checksum_);
  out_.close();
  if (!out_) throw ConfigError(part_.string() + " could not be written to its end; is the disk full?");
  std::filesystem::rename(part_, file_);
  finished_ = true;
}

void TraceWriter::put(const void* data, size_t bytes) {
  out_.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
  if (!out_) throw ConfigError(part_.string() + " could not be written; is the disk full?");
  bytes_ += bytes;
}

}  // namespace lighter::offload
