// Routing traces: what is written is read, and what was damaged is refused.
#include "offload/trace.h"

#include <doctest/doctest.h>

#include "runtime/error.h"
#include "tests/runtime/yaml_file.h"

namespace lighter::offload {
namespace {

// A model whose MoE layers are 1, 2 and 4 of its decoder layers.
TraceHeader header() {
  return {"test", "bf16", {1, 2, 4}, 3, 2, 5, 4096, {1, 2, 3}};
}

struct Written {
  test::YamlFile folder{""};
  std::filesystem::path file = folder.folder / "t.trace";
  std::vector<uint32_t> positions = {0, 1, 2, 0, 1};
  std::vector<uint16_t> values;

  Written() {
    TraceWriter writer(file, header());
    const TraceLayout& layout = writer.layout();
    values.resize(positions.size() * layout.values());
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint16_t>(i * 7);
    for (size_t token = 0; token < positions.size(); ++token) {
      for (int layer = 0; layer < 3; ++layer) {
        uint16_t* experts = &values[token * layout.values() + layout.experts(layer)];
        experts[0] = static_cast<uint16_t>((token + layer) % 3);
        experts[1] = static_cast<uint16_t>((token + layer + 1) % 3);
      }
    }
    writer.write({positions.data(), 2}, {values.data(), 2 * layout.values()});
    writer.write({positions.data() + 2, 3}, {values.data() + 2 * layout.values(), 3 * layout.values()});
    CHECK_FALSE(std::filesystem::exists(file));
    writer.finish();
    CHECK(std::filesystem::file_size(file) == writer.bytes());
  }

  std::string bytes() const {
    std::ifstream in(file, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(in), {});
  }
  void put(const std::string& bytes) const { std::ofstream(file, std::ios::binary) << bytes; }

  // The message, without the file's name; "" when it was read.
  std::string error_of(const std::string& bytes) const {
    put(bytes);
    try {
      Trace::read(file);
    } catch (const CheckpointError& error) {
      const std::string message = error.what();
      CHECK(message.starts_with(file.string() + ": "));
      return message.substr(file.string().size() + 2);
    }
    return "";
  }
};

std::string replaced(std::string text, const std::string& what, const std::string& with) {
  const size_t at = text.find(what);
  REQUIRE(at != std::string::npos);
  return text.replace(at, what.size(), with);
}

}  // namespace

TEST_CASE("a trace reads back as it was written") {
  const Written written;
  const Trace trace = Trace::read(written.file);
  CHECK(trace.header() == header());
  REQUIRE(trace.tokens() == 5);
  CHECK(trace.sequences() == 2);
  const TraceLayout layout(header());
  for (size_t token = 0; token < 5; ++token) {
    CHECK(trace.position(token) == written.positions[token]);
    const uint16_t* values = &written.values[token * layout.values()];
    for (int layer = 0; layer < 3; ++layer) {
      CHECK(trace.experts(token, layer)[1] == values[layout.experts(layer) + 1]);
      CHECK(trace.router_logits(token, layer)[2] == values[layout.router(layer) + 2]);
      for (const int depth : {1, 2, 3}) {
        const auto place = layout.guess(layer, depth);
        const auto guess = trace.guess_logits(token, layer, depth);
        CHECK(guess.size() == (place ? 3 : 0));
        if (place) CHECK(guess[0] == values[*place]);
      }
    }
  }
}

TEST_CASE("a layer has the guesses of earlier MoE layers only, and a record is as long as documented") {
  const TraceLayout layout(header());
  // Depth 1: 2 from 1. Depth 2: 4 from 2. Depth 3: 4 from 1.
  for (int layer = 0; layer < 3; ++layer) {
    CHECK(layout.guess(layer, 1).has_value() == (layer == 1));
    CHECK(layout.guess(layer, 2).has_value() == (layer == 2));
    CHECK(layout.guess(layer, 3).has_value() == (layer == 2));
    CHECK_FALSE(layout.guess(layer, 4).has_value());
  }
  CHECK(layout.values() == 3 * (2 + 3) + 3 * 3);
  const Written written;
  const size_t header_bytes = static_cast<unsigned char>(written.bytes()[12]);
  CHECK(written.bytes().size() == 16 + header_bytes + 5 * (4 + 2 * layout.values()) + 24);
}

TEST_CASE("a damaged trace is refused, with what is wrong with it") {
  const Written written;
  const std::string good = written.bytes();
  REQUIRE(written.error_of(good).empty());
  const auto contains = [&](const std::string& bytes, const std::string& text) {
    const std::string message = written.error_of(bytes);
    CAPTURE(message);
    CHECK(message.find(text) != std::string::npos);
  };
  contains("", "not a routing trace");
  contains("GGUF" + good, "not a routing trace");
  contains(replaced(good, std::string("LTRTRACE\1", 9), std::string("LTRTRACE\2", 9)), "version 2");
  contains(good.substr(0, 40), "within the header");
  contains(replaced(good, "\"experts\"", "\"exports\""), "header is damaged");
  contains(replaced(good, "\"model\"", "{model\""), "header is damaged");
  contains(replaced(good, "\"experts\":3", "\"experts\":1"), "describes no model");
  contains(replaced(good, "[1,2,4]", "[1,4,2]"), "describes no model");
  contains(good.substr(0, good.size() - 1), "cut off");
  contains(good.substr(0, good.size() - 30), "cut off");
  contains(replaced(good, "\"experts\":3", "\"experts\":4"), "holds 5 tokens");
  for (size_t at = good.size() - 80; at < good.size() - 24; at += 7) {
    std::string flipped = good;
    flipped[at] ^= 16;
    contains(flipped, "checksum");
  }
  // No length and no byte makes it do anything but read or refuse.
  for (size_t length = 0; length < good.size(); length += 3) {
    CHECK_FALSE(written.error_of(good.substr(0, length)).empty());
  }
  std::filesystem::remove(written.file);
  CHECK_THROWS_AS(Trace::read(written.file), CheckpointError);
  CHECK_THROWS_AS(Trace::read(written.folder.folder), CheckpointError);
}

TEST_CASE("what no run records is refused") {
  const TraceHeader one{"test", "bf16", {0}, 3, 1, 1, 8, {}};
  const auto trace = [&](std::vector<uint32_t> positions, std::vector<uint16_t> experts) {
    std::vector<uint16_t> values;
    for (const uint16_t expert : experts) values.insert(values.end(), {expert, 0, 0, 0});
    return Trace(one, std::move(positions), std::move(values));
  };
  CHECK(trace({0, 1}, {2, 0}).tokens() == 2);
  CHECK_THROWS_AS(trace({0, 1}, {2, 3}), CheckpointError);
  CHECK_THROWS_AS(trace({0, 2}, {2, 0}), CheckpointError);
  CHECK_THROWS_AS(trace({1}, {2}), CheckpointError);
  CHECK_THROWS_AS(trace({}, {}), CheckpointError);
  CHECK_THROWS_AS(Trace({"test", "bf16", {0}, 3, 2, 1, 8, {}}, {0}, {1, 1, 0, 0, 0}), CheckpointError);
}

TEST_CASE("a trace that was not finished leaves nothing behind") {
  const test::YamlFile folder("");
  {
    TraceWriter writer(folder.folder / "t.trace", header());
    CHECK(std::filesystem::exists(folder.folder / "t.trace.part"));
  }
  CHECK_FALSE(std::filesystem::exists(folder.folder / "t.trace.part"));
  CHECK_FALSE(std::filesystem::exists(folder.folder / "t.trace"));
  CHECK_THROWS_AS(TraceWriter(folder.folder / "no/t.trace", header()), ConfigError);
}

}  // namespace lighter::offload
