#include "offload/trace.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "offload/trace_format.h"
#include "runtime/error.h"

namespace lighter::offload {
namespace {

using namespace trace_format;
using Json = nlohmann::ordered_json;

class Reader {
 public:
  explicit Reader(const std::filesystem::path& file) : name_(file.string()) {
    if (!std::filesystem::is_regular_file(file)) fail("there is no such file; `lighter trace` makes one");
    bytes_.resize(std::filesystem::file_size(file));
    std::ifstream in(file, std::ios::binary);
    if (!in.read(bytes_.data(), static_cast<std::streamsize>(bytes_.size()))) fail("the file cannot be read");
  }

  Trace read() {
    const TraceHeader header = read_header();
    const TraceLayout layout(header);
    const size_t record = 4 + 2 * layout.values();
    if (bytes_.size() < next_ + kFooterBytes) fail_cut_off("it ends after the header");
    const size_t records_bytes = bytes_.size() - kFooterBytes - next_;
    const char* footer = bytes_.data() + next_ + records_bytes;
    if (std::memcmp(footer, kEnd, kMagicBytes) != 0) fail_cut_off("its end mark is missing");
    const auto tokens = value_at<uint64_t>(footer + kMagicBytes);
    if (records_bytes % record != 0 || records_bytes / record != tokens) {
      fail("it says that it holds " + std::to_string(tokens) + " tokens of " + std::to_string(record) +
           " bytes, but has " + std::to_string(records_bytes) + " bytes of them; record it again");
    }
    const char* from = bytes_.data() + next_;
    if (checksum(kChecksumBegin, from, records_bytes) != value_at<uint64_t>(footer + kMagicBytes + 8)) {
      fail("its contents do not match its checksum, so it was damaged; record it again");
    }
    std::vector<uint32_t> positions(tokens);
    std::vector<uint16_t> values(tokens * layout.values());
    for (size_t token = 0; token < tokens; ++token, from += record) {
      positions[token] = value_at<uint32_t>(from);
      std::memcpy(&values[token * layout.values()], from + 4, record - 4);
    }
    return Trace(header, std::move(positions), std::move(values), name_);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const { throw CheckpointError(name_ + ": " + what); }
  [[noreturn]] void fail_cut_off(const std::string& what) const {
    fail("the trace was cut off at " + std::to_string(bytes_.size()) + " bytes: " + what +
         "; record it again");
  }

  template <typename T>
  static T value_at(const char* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }

  TraceHeader read_header() {
    if (bytes_.size() < kFrontBytes || std::memcmp(bytes_.data(), kMagic, kMagicBytes) != 0) {
      fail("this is not a routing trace; `lighter trace` makes one");
    }
    const auto version = value_at<uint32_t>(bytes_.data() + kMagicBytes);
    if (version != kVersion) {
      fail("the trace is of version " + std::to_string(version) + ", but this program reads version " +
           std::to_string(kVersion) + "; record it again");
    }
    const size_t length = value_at<uint32_t>(bytes_.data() + kMagicBytes + 4);
    if (length > bytes_.size() - kFrontBytes) fail_cut_off("it ends within the header");
    next_ = kFrontBytes + length;
    TraceHeader header;
    try {
      const Json json = Json::parse(bytes_.data() + kFrontBytes, bytes_.data() + next_);
      json.at("model").get_to(header.model);
      json.at("dtype").get_to(header.dtype);
      json.at("layers").get_to(header.layers);
      json.at("experts").get_to(header.experts);
      json.at("experts_per_token").get_to(header.experts_per_token);
      json.at("slices").get_to(header.slices);
      json.at("slice_bytes").get_to(header.slice_bytes);
      json.at("depths").get_to(header.depths);
    } catch (const Json::exception& error) {
      fail("the header is damaged (" + std::string(error.what()) + "); record it again");
    }
    check(header);
    return header;
  }

  static bool ascending(const std::vector<int>& values, int least) {
    return std::adjacent_find(values.begin(), values.end(), std::greater_equal<>()) == values.end() &&
           (values.empty() || values.front() >= least);
  }

  void check(const TraceHeader& header) const {
    constexpr int kMost = 1 << 16;
    const auto possible = [](int count) { return count >= 1 && count <= kMost; };
    if (!possible(header.experts) || !possible(header.experts_per_token) || !possible(header.slices) ||
        header.experts_per_token > header.experts || header.layers.empty() || header.layers.size() > kMost ||
        header.depths.size() > kMost || !ascending(header.layers, 0) || !ascending(header.depths, 1)) {
      fail("the header describes no model: " + std::to_string(header.layers.size()) + " MoE layers of " +
           std::to_string(header.experts) + " experts, " + std::to_string(header.experts_per_token) +
           " a token, in " + std::to_string(header.slices) + " slices; record it again");
    }
  }

  const std::string name_;
  std::vector<char> bytes_;
  size_t next_ = 0;
};

}  // namespace

TraceLayout::TraceLayout(const TraceHeader& header) {
  const auto take = [this](int count) {
    const size_t place = values_;
    values_ += static_cast<size_t>(count);
    return place;
  };
  for (const int decoder_layer : header.layers) {
    Layer layer;
    layer.experts = take(header.experts_per_token);
    layer.router = take(header.experts);
    for (const int depth : header.depths) {
      if (!std::binary_search(header.layers.begin(), header.layers.end(), decoder_layer - depth)) continue;
      layer.guesses.emplace_back(depth, take(header.experts));
    }
    layers_.push_back(std::move(layer));
  }
}

std::optional<size_t> TraceLayout::guess(int layer, int depth) const {
  for (const auto& [guess_depth, place] : layers_[layer].guesses) {
    if (guess_depth == depth) return place;
  }
  return std::nullopt;
}

Trace Trace::read(const std::filesystem::path& file) {
  return Reader(file).read();
}

Trace::Trace(TraceHeader header, std::vector<uint32_t> positions, std::vector<uint16_t> values,
             const std::string& source)
    : header_(std::move(header)),
      layout_(header_),
      positions_(std::move(positions)),
      values_(std::move(values)) {
  check(source);
}

void Trace::check(const std::string& source) const {
  const auto fail = [&](size_t token, const std::string& what) {
    throw CheckpointError(source + ": token " + std::to_string(token) + " " + what +
                          "; record the trace again");
  };
  if (tokens() == 0 || values_.size() != tokens() * layout_.values()) {
    throw CheckpointError(source + ": the trace holds no tokens; record it again");
  }
  for (size_t token = 0; token < tokens(); ++token) {
    if (positions_[token] != 0 && (token == 0 || positions_[token] != positions_[token - 1] + 1)) {
      fail(token, "stands at position " + std::to_string(positions_[token]) +
                      ", which does not follow the last one");
    }
    for (int layer = 0; layer < header_.grid().layers; ++layer) {
      const auto chosen = experts(token, layer);
      for (auto expert = chosen.begin(); expert != chosen.end(); ++expert) {
        if (*expert < header_.experts && std::find(chosen.begin(), expert, *expert) == expert) continue;
        fail(token, "takes expert " + std::to_string(*expert) + " in MoE layer " + std::to_string(layer) +
                        " of " + std::to_string(header_.experts) + " experts, or takes it twice");
      }
    }
  }
}

size_t Trace::sequences() const {
  return std::count(positions_.begin(), positions_.end(), 0u);
}

std::span<const uint16_t> Trace::guess_logits(size_t token, int layer, int depth) const {
  const auto place = layout_.guess(layer, depth);
  return place ? at(token, *place, header_.experts) : std::span<const uint16_t>();
}

}  // namespace lighter::offload
