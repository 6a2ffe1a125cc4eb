// Model folders are written, damaged in one way each, and opened.
#include "models/checkpoint/checkpoint.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <utility>

#include "runtime/float_convert.h"
#include "tests/models/checkpoint_folder.h"

namespace lighter::models {

using namespace testing;

TEST_CASE("a checkpoint of one file lists and reads what was written") {
  const TempFolder dir;
  const TestTensor weights = test_tensor("w", StoredType::fp32, {3, 4});
  write_file(dir / "model.safetensors",
             {weights, test_tensor("ids", StoredType::int32, {2}),
              test_tensor("scalar", StoredType::fp32, {}), test_tensor("empty", StoredType::bf16, {0, 7})});
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  CHECK(checkpoint.names() == std::vector<std::string>{"empty", "ids", "scalar", "w"});
  CHECK(checkpoint.total_bytes() == 48 + 8 + 4);
  CHECK(checkpoint.info("w").shape == std::vector<std::int64_t>{3, 4});
  CHECK(checkpoint.info("w").type == StoredType::fp32);
  CHECK(checkpoint.info("w").bytes == 48);
  CHECK(checkpoint.info("scalar").elements == 1);
  CHECK(checkpoint.contains("ids"));
  CHECK_FALSE(checkpoint.contains("id"));
  std::vector<float> read(12);
  checkpoint.read("w", 0, 12, DType::fp32, read.data());
  CHECK(std::memcmp(read.data(), weights.bytes.data(), 48) == 0);
  checkpoint.read("empty", 0, 0, DType::fp32, nullptr);
}

TEST_CASE("a sharded checkpoint reads each tensor from its shard") {
  const TempFolder dir;
  write_sharded(dir);
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  CHECK(checkpoint.names() == std::vector<std::string>{"a", "b", "c"});
  CHECK(checkpoint.total_bytes() == 24 + 8 + 10);
  const TestTensor b = test_tensor("b", StoredType::bf16, {4});
  std::vector<std::uint16_t> read(4);
  checkpoint.read("b", 0, 4, DType::bf16, read.data());
  CHECK(std::memcmp(read.data(), b.bytes.data(), 8) == 0);
}

TEST_CASE("any range of any stored float type reads as fp32 and bf16, also across the scratch size") {
  const TempFolder dir;
  // More elements than the scratch holds, and not a multiple of it.
  const std::int64_t count = static_cast<std::int64_t>(Checkpoint::kScratchBytes) / 2 + 1001;
  std::vector<TestTensor> tensors;
  for (const StoredType type : {StoredType::fp32, StoredType::fp16, StoredType::bf16}) {
    tensors.push_back(test_tensor(to_string(type), type, {count}));
  }
  write_file(dir / "model.safetensors", tensors);
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  for (const TestTensor& tensor : tensors) {
    const std::uint64_t size = element_bytes(tensor.type);
    const auto expected = [&](std::int64_t i) {
      float wide = 0;
      std::uint16_t half = 0;
      const auto* bytes = tensor.bytes.data() + static_cast<std::uint64_t>(i) * size;
      std::memcpy(size == 4 ? static_cast<void*>(&wide) : &half, bytes, size);
      if (tensor.type == StoredType::fp16) return fp16_to_fp32(half);
      return tensor.type == StoredType::bf16 ? bf16_to_fp32(half) : wide;
    };
    const std::pair<std::int64_t, std::int64_t> ranges[] = {{0, count}, {1, count - 1}, {777, 3}, {count, 0}};
    for (const auto& [first, n] : ranges) {
      std::vector<float> wide(static_cast<std::size_t>(n) + 1, 12.5f);
      std::vector<std::uint16_t> narrow(static_cast<std::size_t>(n) + 1, 0x1234);
      checkpoint.read(tensor.name, first, n, DType::fp32, wide.data());
      checkpoint.read(tensor.name, first, n, DType::bf16, narrow.data());
      std::int64_t wrong = 0;
      for (std::int64_t i = 0; i < n; ++i) {
        const auto at = static_cast<std::size_t>(i);
        const float want = expected(first + i);
        wrong += std::bit_cast<std::uint32_t>(wide[at]) != std::bit_cast<std::uint32_t>(want);
        // Bytes stored as bf16 stay as they are, so a signalling NaN stays one too.
        const bool quieted = tensor.type == StoredType::bf16 && want != want;
        wrong += !quieted && narrow[at] != fp32_to_bf16(want);
      }
      CHECK(wrong == 0);
      CHECK(wide.back() == 12.5f);  // nothing is written past the end
      CHECK(narrow.back() == 0x1234);
    }
  }
}

TEST_CASE("many threads read one checkpoint at once") {
  const TempFolder dir;
  const TestTensor tensor = test_tensor("w", StoredType::bf16, {100, 1000});
  write_file(dir / "model.safetensors", {tensor});
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      std::vector<float> row(1000);
      for (int i = 0; i < 100; ++i) {
        const std::int64_t first = ((t * 13 + i) % 100) * 1000;
        checkpoint.read("w", first, 1000, DType::fp32, row.data());
        std::uint16_t stored = 0;
        std::memcpy(&stored, tensor.bytes.data() + first * 2, 2);
        wrong += std::bit_cast<std::uint32_t>(row[0]) != std::uint32_t{stored} << 16;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(wrong == 0);
}

TEST_CASE("ranges outside a tensor are refused before anything is read") {
  const TempFolder dir;
  write_file(dir / "model.safetensors", {test_tensor("w", StoredType::fp32, {4})});
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  constexpr std::int64_t huge = std::numeric_limits<std::int64_t>::max();
  const std::pair<std::int64_t, std::int64_t> ranges[] = {{0, 5},  {4, 1},  {5, 0},
                                                          {-1, 1}, {1, -1}, {1, huge}};
  for (const auto& [first, count] : ranges) {
    float untouched[8] = {};
    CHECK(has(message_of([&] { checkpoint.read("w", first, count, DType::fp32, untouched); }), "elements ["));
  }
}

TEST_CASE("a tensor that is not there is reported with the nearest names") {
  const TempFolder dir;
  write_file(dir / "model.safetensors",
             {test_tensor("language_model.model.norm.weight", StoredType::bf16, {2}),
              test_tensor("model.layers.0.self_attn.q_proj.weight", StoredType::bf16, {2}),
              test_tensor("model.layers.0.mlp.up_proj.weight", StoredType::bf16, {2})});
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  CHECK(has(message_of([&] { checkpoint.info("model.norm.weight"); }),
            "the nearest names are \"language_model.model.norm.weight\""));
  CHECK(has(message_of([&] { checkpoint.info("model.layers.0.self_attn.k_proj.weight"); }),
            "the nearest names are \"model.layers.0.self_attn.q_proj.weight\""));
  float value = 0;
  CHECK(has(message_of([&] { checkpoint.read("x", 0, 1, DType::fp32, &value); }), "no tensor \"x\""));
}

TEST_CASE("expect accepts the right shape and names both otherwise") {
  const TempFolder dir;
  write_file(dir / "model.safetensors",
             {test_tensor("w", StoredType::bf16, {2, 3}), test_tensor("fp8", StoredType::fp8_e4m3, {6}),
              test_tensor("int8", StoredType::int8, {6})});
  const Checkpoint checkpoint = Checkpoint::open(dir.path());
  const auto expect = [&](std::string_view name, std::vector<std::int64_t> shape) {
    checkpoint.expect(name, shape);
  };
  CHECK_NOTHROW(expect("w", {2, 3}));
  for (const auto& shape : {std::vector<std::int64_t>{3, 2}, {2}, {2, 3, 1}, {}}) {
    const std::string message = message_of([&] { expect("w", shape); });
    CHECK(has(message, "[2, 3]"));
    CHECK(has(message, shape_text(shape)));
  }
  CHECK(has(message_of([&] { expect("fp8", {6}); }),
            "fp8 weights are not supported yet; use the bf16 checkpoint"));
  CHECK(has(message_of([&] { expect("int8", {6}); }), "int8 weights are not supported yet"));
  float values[6];
  CHECK(has(message_of([&] { checkpoint.read("fp8", 0, 6, DType::fp32, values); }),
            "fp8 weights are not supported yet"));
}

TEST_CASE("a folder without safetensors weights says what it holds instead") {
  const TempFolder dir;
  CHECK(has(message_of([&] { Checkpoint::open(dir / "nowhere"); }), "there is no model folder"));
  CHECK(has(open_error(dir), "no model.safetensors or model.safetensors.index.json"));
  write_text(dir / "config.json", "{}");
  CHECK(has(message_of([&] { Checkpoint::open(dir / "config.json"); }), "is not a folder"));
  CHECK(has(open_error(dir), "give the folder that holds"));
  write_text(dir / "pytorch_model.bin", "x");
  CHECK(has(open_error(dir), "it holds only pytorch_model.bin; only safetensors weights can be read"));
  write_text(dir / "scout.gguf", "x");
  write_text(dir / "consolidated.00.pth", "x");
  CHECK(has(open_error(dir), "it holds only consolidated.00.pth and 2 like it"));
  write_text(dir / "model-00001-of-00002.safetensors", "x");
  CHECK(has(open_error(dir), "get the index file too"));
}

TEST_CASE("a broken index is refused") {
  const TempFolder dir;
  write_sharded(dir);
  const fs::path index = dir / "model.safetensors.index.json";
  write_text(index, R"({"weight_map": {"a": )");
  CHECK(has(open_error(dir), "not valid JSON"));
  for (const char* text : {"[]", "3", "{}", R"({"weight_map": []})", R"({"weight_map": {}})"}) {
    write_text(index, text);
    CHECK(has(open_error(dir), "has no \"weight_map\""));
  }
  for (const char* file :
       {"3", "\"\"", "\"../x.safetensors\"", "\"/etc/x.safetensors\"", "\"..\"", "\"d/x\""}) {
    write_text(index, std::string(R"({"weight_map": {"a": )") + file + "}}");
    CHECK(has(open_error(dir), "tensor \"a\" does not name a file of this folder"));
  }
  write_text(index, R"({"weight_map": {"a": "model-1.safetensors", "a": "model-2.safetensors"}})");
  CHECK(has(open_error(dir), "\"a\" appears twice"));
}

TEST_CASE("all missing shards are listed") {
  const TempFolder dir;
  write_sharded(dir);
  fs::remove(dir / "model-1.safetensors");
  CHECK(has(open_error(dir), "1 of 2 files that the index"));
  fs::remove(dir / "model-2.safetensors");
  CHECK(has(open_error(dir), "are missing: model-1.safetensors, model-2.safetensors;"));
}

TEST_CASE("index and shards must agree") {
  const TempFolder dir;
  write_sharded(dir);
  SUBCASE("a tensor that its shard does not hold") {
    write_file(dir / "model-2.safetensors", {test_tensor("d", StoredType::fp16, {5})});
    const std::string message = open_error(dir);
    CHECK(has(message, "places tensor \"c\" in model-2.safetensors, but that file does not hold it"));
  }
  SUBCASE("a tensor that lies in another shard") {
    write_safetensors_index(
        dir.path(),
        {{"a", "model-1.safetensors"}, {"b", "model-2.safetensors"}, {"c", "model-2.safetensors"}}, 42);
    CHECK(has(open_error(dir), "places tensor \"b\" in model-2.safetensors"));
  }
  SUBCASE("a tensor in two shards") {
    write_file(dir / "model-2.safetensors",
               {test_tensor("b", StoredType::fp16, {5}), test_tensor("c", StoredType::fp16, {5})});
    const std::string message = open_error(dir);
    CHECK(has(message, "tensor \"b\" is in two files"));
    CHECK(has(message, "model-1.safetensors"));
    CHECK(has(message, "model-2.safetensors"));
  }
  SUBCASE("a tensor that the index leaves out is still found") {
    write_safetensors_index(dir.path(), {{"a", "model-1.safetensors"}, {"c", "model-2.safetensors"}}, 42);
    CHECK(Checkpoint::open(dir.path()).contains("b"));
  }
}

TEST_CASE("folders that transformers wrote open, and every tensor in them reads") {
  const fs::path goldens = fs::path(LIGHTER_SOURCE_DIR) / "tests" / "goldens";
  int folders = 0;
  for (const auto& entry : fs::directory_iterator(goldens)) {
    if (!fs::exists(entry.path() / "config.json")) continue;
    ++folders;
    const Checkpoint checkpoint = Checkpoint::open(entry.path());
    for (const std::string& name : checkpoint.names()) {
      const TensorInfo& info = checkpoint.info(name);
      CHECK_NOTHROW(checkpoint.expect(name, info.shape));
      std::vector<float> values(static_cast<std::size_t>(info.elements), NAN);
      checkpoint.read(name, 0, info.elements, DType::fp32, values.data());
      const auto finite = [](float value) { return std::isfinite(value); };
      CHECK(std::all_of(values.begin(), values.end(), finite));
    }
  }
  CHECK(folders > 0);
}

}  // namespace lighter::models
