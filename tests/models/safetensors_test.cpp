// Single safetensors files, damaged in every way that the reader must notice, and the writer.
#include "models/checkpoint/safetensors.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <random>
#include <sstream>
#include <utility>

#include "tests/models/checkpoint_folder.h"

namespace lighter::models {

using namespace testing;

TEST_CASE("a type that is not known is listed, and refused only when it is read") {
  const TempFolder dir;
  write_raw(dir / "model.safetensors", R"({"w":{"dtype":"F4","shape":[6],"data_offsets":[0,3]}})", 3);
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  CHECK(checkpoint.info("w").type == StoredType::other);
  float values[6];
  CHECK(has(message_of([&] { checkpoint.read("w", 0, 6, DType::fp32, values); }),
            "\"F4\" weights are not supported yet"));
}

TEST_CASE("a truncated file says how many bytes are expected and how many there are") {
  const TempFolder dir;
  const fs::path path = dir / "model.safetensors";
  write_file(path, {test_tensor("w", StoredType::fp32, {100}), test_tensor("v", StoredType::fp32, {100})});
  const std::uint64_t whole = fs::file_size(path);
  fs::resize_file(path, whole - 3);
  CHECK(has(open_error(dir), "is truncated: expected " + std::to_string(whole) + " bytes, found " +
                                 std::to_string(whole - 3)));
  fs::resize_file(path, 50);
  CHECK(has(open_error(dir), "is truncated within its header"));
  fs::resize_file(path, 7);
  CHECK(has(open_error(dir), "expected at least 8 bytes, found 7"));
  fs::resize_file(path, 0);
  CHECK(has(open_error(dir), "expected at least 8 bytes, found 0"));
}

TEST_CASE("a file that shrinks after it was opened is an error and not a crash") {
  const TempFolder dir;
  const fs::path path = dir / "model.safetensors";
  write_file(path, {test_tensor("w", StoredType::fp32, {100})});
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  fs::resize_file(path, fs::file_size(path) - 100);
  std::vector<float> values(100);
  CHECK(has(message_of([&] { checkpoint.read("w", 0, 100, DType::fp32, values.data()); }),
            "100 more were expected"));
}

TEST_CASE("files that are not safetensors are recognised") {
  const TempFolder dir;
  write_text(dir / "model.safetensors",
             "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n");
  CHECK(has(open_error(dir), "git-lfs pointer"));
  write_text(dir / "model.safetensors", "PK\x03\x04 something else entirely");
  CHECK(has(open_error(dir), "is not a safetensors file"));
  CHECK(has(header_error("{\"w\": ", 0), "not valid JSON"));
  CHECK(has(header_error("", 0), "not valid JSON"));
  CHECK(has(header_error("[]", 0), "not a JSON object"));
  CHECK(has(header_error("{\"w\xff\": 1}", 0), "not valid JSON"));
  CHECK(has(header_error(std::string(1'000'000, '['), 0), "nested too deeply"));
}

TEST_CASE("every way in which a header can lie about its tensors is refused") {
  const auto one = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return "\"dtype\":" + dtype + ",\"shape\":" + shape + ",\"data_offsets\":" + offsets;
  };
  const auto entry_error = [&](const std::string& dtype, const std::string& shape,
                               const std::string& offsets) {
    return header_error("{\"w\":{" + one(dtype, shape, offsets) + "}}", 8);
  };
  SUBCASE("the description is not complete or of the wrong type") {
    CHECK(has(header_error(R"({"w":3})", 0), "not described by a JSON object"));
    CHECK(has(header_error(R"({"w":{}})", 0), "has no \"dtype\""));
    CHECK(has(entry_error("3", "[2]", "[0,8]"), "\"dtype\" has the wrong type"));
    CHECK(has(entry_error("\"F32\"", "2", "[0,8]"), "\"shape\" has the wrong type"));
    CHECK(has(entry_error("\"F32\"", "[2.0]", "[0,8]"), "not a size"));
    CHECK(has(entry_error("\"F32\"", "[-2]", "[0,8]"), "not a size"));
    CHECK(has(entry_error("\"F32\"", "[9223372036854775808]", "[0,8]"), "not a size"));
    CHECK(has(entry_error("\"F32\"", "[2]", "[0]"), "not [begin, end]"));
    CHECK(has(entry_error("\"F32\"", "[2]", "[-8,0]"), "not [begin, end]"));
    CHECK(has(entry_error("\"F32\"", "[2]", "[\"0\",8]"), "not [begin, end]"));
    CHECK(has(entry_error("\"F32\"", "[2]", "[1e999,8]"), "a number is too large"));
  }
  SUBCASE("shape, type and offsets do not fit together") {
    CHECK(has(entry_error("\"F32\"", "[3]", "[0,8]"), "shape [3] of fp32 needs 3 x 4 bytes"));
    CHECK(has(entry_error("\"F32\"", "[2]", "[8,0]"), "impossible offsets [8, 0)"));
    CHECK(has(entry_error("\"F32\"", "[2]", "[0,18446744073709551615]"), "impossible offsets"));
    CHECK(has(entry_error("\"F32\"", "[4294967296,4294967296]", "[0,8]"), "too many elements"));
    CHECK(has(entry_error("\"F32\"", "[4611686018427387904]", "[0,0]"), "needs"));
  }
  SUBCASE("tensors overlap, leave gaps, or end elsewhere than the file") {
    const std::string a = "{\"a\":{" + one("\"F32\"", "[2]", "[0,8]") + "},\"b\":{";
    CHECK(has(header_error(a + one("\"F32\"", "[2]", "[4,12]") + "}}", 12), "\"a\" and \"b\" overlap"));
    CHECK(has(header_error(a + one("\"F32\"", "[2]", "[0,8]") + "}}", 8), "overlap"));
    CHECK(has(header_error(a + one("\"F32\"", "[0]", "[4,4]") + "}}", 8), "overlap"));
    CHECK(has(header_error(a + one("\"F32\"", "[2]", "[12,20]") + "}}", 20), "4 bytes before tensor \"b\""));
    CHECK(has(header_error(a + one("\"F32\"", "[2]", "[8,16]") + "}}", 15), "ends beyond the end"));
    CHECK(has(header_error(a + one("\"F32\"", "[2]", "[8,16]") + "}}", 17), "past the last tensor"));
    CHECK(has(header_error(a + one("\"F32\"", "[2]", "[8,16]") + "},\"a\":{}}", 16), "\"a\" appears twice"));
  }
}

TEST_CASE("ten thousand damaged headers are read or refused, never more") {
  const TempFolder dir;
  const fs::path path = dir / "model.safetensors";
  write_file(path,
             {test_tensor("first", StoredType::fp32, {2, 5}), test_tensor("second", StoredType::bf16, {7}),
              test_tensor("third", StoredType::fp8_e4m3, {3}), test_tensor("fourth", StoredType::uint8, {})});
  std::stringstream whole;
  whole << std::ifstream(path, std::ios::binary).rdbuf();
  const std::string original = whole.str();
  const std::size_t header_end = original.find('}', original.find("fourth")) + 2;
  const std::vector<std::string> tokens = {"18446744073709551615",
                                           "9223372036854775807",
                                           "-1",
                                           "1e9",
                                           "0",
                                           "null",
                                           "[",
                                           "]",
                                           "{",
                                           "}",
                                           "\"",
                                           ",",
                                           "[[",
                                           "\"F64\"",
                                           "\\u0000",
                                           "\xff"};
  std::mt19937 random(7);
  const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random()) % n; };
  int opened = 0;
  int refused = 0;
  for (int i = 0; i < 10'000; ++i) {
    std::string text = original;
    for (std::size_t edits = 1 + below(3); edits > 0; --edits) {
      const std::size_t at = below(header_end);
      const std::string& token = tokens[below(tokens.size())];
      switch (below(5)) {
        case 0:
          text[at] = static_cast<char>(random());
          break;
        case 1:
          text[at] = static_cast<char>(text[at] ^ (1 << below(8)));
          break;
        case 2:
          text.replace(at, std::min(token.size(), header_end - at), token);
          break;
        case 3:
          text.replace(at, 1, std::string(1, static_cast<char>('0' + below(10))));
          break;
        default:
          std::memcpy(text.data(), std::to_string(random()).data(), 1 + below(4));
          break;
      }
    }
    write_text(path, text);
    try {
      const Checkpoint checkpoint = Checkpoint::open(dir.path());
      ++opened;
      for (const std::string& name : checkpoint.names()) {
        const TensorInfo& info = checkpoint.info(name);
        REQUIRE(info.bytes <= text.size());
        if (info.type != StoredType::fp32 && info.type != StoredType::bf16) continue;
        std::vector<float> values(static_cast<std::size_t>(info.elements));
        checkpoint.read(name, 0, info.elements, DType::fp32, values.data());
      }
    } catch (const CheckpointError&) {
      ++refused;
    }
  }
  CHECK(opened > 100);  // or nothing past the header would have been tried
  CHECK(refused > 1000);
}

TEST_CASE("stored bytes are read as they are, and only those of the tensor") {
  const TempFolder dir;
  const TestTensor second = test_tensor("b", StoredType::uint8, {4});
  write_file(dir / "x.safetensors",
             {test_tensor("a", StoredType::uint8, {4}), second, test_tensor("c", StoredType::uint8, {4})});
  const SafetensorsFile file(dir / "x.safetensors");
  REQUIRE(file.tensors().size() == 3);
  const TensorInfo& tensor = file.tensors()[1];
  CHECK(tensor.name == "b");
  std::vector<std::uint8_t> bytes(3);
  file.read_bytes(tensor, 1, 3, bytes.data());
  CHECK(std::equal(bytes.begin(), bytes.end(), second.bytes.begin() + 1));
  constexpr std::uint64_t huge = std::numeric_limits<std::uint64_t>::max();
  const std::pair<std::uint64_t, std::uint64_t> ranges[] = {{0, 5}, {4, 1}, {5, 0}, {1, huge}, {huge, 2}};
  for (const auto& [first, count] : ranges) {
    std::uint8_t untouched[8];
    CHECK(has(message_of([&] { file.read_bytes(tensor, first, count, untouched); }), "not within tensor"));
  }
}

TEST_CASE("the writer takes pieces in order and nothing else") {
  const TempFolder dir;
  const fs::path path = dir / "model.safetensors";
  const std::vector<std::uint8_t> bytes(16, 7);
  {
    SafetensorsWriter writer(path);
    writer.declare("a", StoredType::fp32, {3});
    CHECK(has(message_of([&] { writer.declare("a", StoredType::fp32, {1}); }), "is taken"));
    CHECK(has(message_of([&] { writer.declare("n", StoredType::fp32, {-1}); }), "impossible shape [-1]"));
    CHECK(has(message_of([&] { writer.declare("w", StoredType::fp64, {1}); }), "wider types first"));
    CHECK(has(message_of([&] { writer.declare("o", StoredType::other, {1}); }), "cannot be written"));
    writer.declare("empty", StoredType::fp32, {0});
    writer.declare("b", StoredType::bf16, {2});
    CHECK(writer.declared_bytes() == 16);
    writer.append("a", bytes.data(), 5);
    CHECK(has(message_of([&] { writer.append("b", bytes.data(), 4); }), "the next one is \"a\""));
    CHECK(has(message_of([&] { writer.append("a", bytes.data(), 8); }), "only 7 are missing"));
    CHECK(has(message_of([&] { writer.declare("c", StoredType::bf16, {1}); }), "after the first append"));
    writer.append("a", bytes.data(), 7);
    CHECK(has(message_of([&] { writer.finish(); }), "\"b\" still misses 4 bytes"));
    writer.append("b", bytes.data(), 4);
    CHECK(has(message_of([&] { writer.append("b", bytes.data(), 1); }), "all are complete"));
    CHECK_FALSE(fs::exists(path));
    writer.finish();
    CHECK(has(message_of([&] { writer.finish(); }), "already finished"));
  }
  CHECK(Checkpoint::open(dir.path()).names() == std::vector<std::string>{"a", "b", "empty"});
}

TEST_CASE("a writer that does not finish leaves nothing behind") {
  const TempFolder dir;
  {
    SafetensorsWriter writer(dir / "model.safetensors");
    writer.declare("a", StoredType::fp32, {3});
    writer.append("a", "1234", 4);
  }
  CHECK(fs::is_empty(dir.path()));
  CHECK(
      has(message_of([&] { SafetensorsWriter writer(dir / "nowhere/model.safetensors"); }), "cannot create"));
}

}  // namespace lighter::models
