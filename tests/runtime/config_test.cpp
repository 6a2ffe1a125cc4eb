#include "runtime/config/config.h"

#include <doctest/doctest.h>

#include "runtime/bytes.h"
#include "runtime/error.h"
#include "tests/runtime/yaml_file.h"

namespace fs = std::filesystem;
using namespace lighter;
using namespace lighter::test;

TEST_CASE("a minimal file gets the documented defaults, and a relative model path starts at the file") {
  const YamlFile yaml(kMinimal);
  const Config config = load_config(yaml.file);
  CHECK(config.model.path == yaml.folder / "m");
  CHECK(!config.model.is_synthetic());
  CHECK(config.model.dtype == DType::bf16);
  CHECK(config.device.kind == DeviceConfig::Kind::cuda);
  CHECK(config.device.index == 0);
  CHECK(config.memory.gpu_budget_bytes == 1ull << 30);
  CHECK(config.memory.context == 8192);
  CHECK(config.memory.kv_block == 256);
  CHECK(std::holds_alternative<ResidentAuto>(config.offload.resident));
  CHECK(config.offload.policy == OffloadConfig::Policy::lru);
  CHECK(config.offload.prefetch.enabled);
  CHECK(config.offload.prefetch.depth == 1);
  CHECK(config.offload.routing.schedule == RoutingConfig::Schedule::router);
  CHECK(config.generate.max_tokens == 256);
  CHECK(!config.generate.top_k);
  CHECK(load("model: {path: /abs/m}\n" + kMinimal.substr(kMinimal.find("memory"))).model.path == "/abs/m");
}

TEST_CASE("every key reaches its field") {
  const Config c = load(R"(
model: {synthetic: sub/../c.json, dtype: fp32, layers: 3, seed: 18446744073709551615}
device: cuda:2
memory: {gpu_budget: 1.5KiB, host_budget: 2 GB, context: 100, prefill_chunk: 64, kv_block: 16}
offload:
  resident: [0, 0.5, 1]
  policy: static
  pin: ["0-3/*", "7/2,5"]
  prefetch: {enabled: false, depth: 8}
  slice_width: 128
  near_pages: false
  routing: {schedule: zipf:1.1, seed: 5}
cpu: {threads: 4}
generate: {max_tokens: 9, temperature: 0.7, top_k: 40, top_p: 0.9, min_p: 0.05, seed: 7, stop: ["\n", "1"],
           ignore_eos: true}
)");
  CHECK(fs::path(c.model.synthetic).is_absolute());
  CHECK(fs::path(c.model.synthetic).filename() == "c.json");
  CHECK(c.model.dtype == DType::fp32);
  CHECK(c.model.layers == 3);
  CHECK(c.model.seed == 18446744073709551615ull);
  CHECK(c.device.index == 2);
  CHECK(c.memory.gpu_budget_bytes == 1536);
  CHECK(c.memory.host_budget_bytes == 2'000'000'000);
  CHECK(c.memory.context == 100);
  CHECK(c.memory.prefill_chunk == 64);
  CHECK(c.memory.kv_block == 16);
  CHECK(std::get<std::vector<double>>(c.offload.resident) == std::vector<double>{0, 0.5, 1});
  CHECK(c.offload.policy == OffloadConfig::Policy::static_);
  REQUIRE(c.offload.pin.size() == 2);
  CHECK(c.offload.pin[0].contains(3, 15));
  CHECK(!c.offload.pin[0].contains(4, 0));
  CHECK(c.offload.pin[1].contains(7, 5));
  CHECK(!c.offload.pin[1].contains(7, 3));
  CHECK(c.offload.pin[1].experts.max_index() == 5);
  CHECK(!c.offload.prefetch.enabled);
  CHECK(c.offload.prefetch.depth == 8);
  CHECK(c.offload.slice_width == 128);
  CHECK(!c.offload.near_pages);
  CHECK(c.offload.routing.schedule == RoutingConfig::Schedule::zipf);
  CHECK(c.offload.routing.zipf_s == doctest::Approx(1.1));
  CHECK(c.offload.routing.seed == 5);
  CHECK(c.cpu.threads == 4);
  CHECK(c.generate.max_tokens == 9);
  CHECK(c.generate.temperature == doctest::Approx(0.7));
  CHECK(c.generate.top_k == 40);
  CHECK(*c.generate.top_p == doctest::Approx(0.9));
  CHECK(*c.generate.min_p == doctest::Approx(0.05));
  CHECK(c.generate.seed == 7u);
  CHECK(c.generate.stop == std::vector<std::string>{"\n", "1"});
  CHECK(c.generate.ignore_eos);
}

TEST_CASE("formats: one for all that single keys override, and one for each layer") {
  using enum SliceEncoding;
  const ModelConfig none = load(kMinimal).model;
  CHECK(none.experts == dense);
  CHECK(none.shared.at(3) == dense);
  CHECK(none.head == dense);
  const ModelConfig m = load(kMinimal, {"model.format=int4", "model.head=int8",
                                        "model.attention={\"*\": int8, \"0-1,47\": dtype, 5: int4}"})
                            .model;
  CHECK(m.format == int4);
  CHECK(m.experts == int4);
  CHECK(m.shared.at(0) == int4);
  CHECK(m.shared.max_layer() == -1);
  CHECK(m.head == int8);
  for (const auto& [layer, encoding] : {std::pair{0, dense}, {1, dense}, {2, int8}, {5, int4}, {47, dense}}) {
    CHECK(m.attention.at(layer) == encoding);
  }
  CHECK(m.attention.max_layer() == 47);
  // A key that is set wins wherever it stands.
  CHECK(load(kMinimal, {"model.experts=int8", "model.format=int4"}).model.experts == int8);

  CHECK(error_of(kMinimal, {"model.shared={0-3: int8, \"2,9\": int4}"}) ==
        "--set model.shared={0-3: int8, \"2,9\": int4}: 'model.shared': '0-3' and '2,9' overlap; name each layer once");
  CHECK(error_of("model:\n  path: m\n  attention:\n    0-: int8\n").starts_with("f.yaml:4:5: 'model.attention' must be"));
  CHECK(error_of("model:\n  path: m\n  attention:\n    0: int9\n") ==
        "f.yaml:4:8: 'model.attention[\"0\"]' must be one of dtype, int8, int4, but is 'int9'");
}

TEST_CASE("a null key or section is not set") {
  const Config config = load(kMinimal + "generate: {top_k: , seed: ~, max_tokens: }\noffload:\n");
  CHECK(!config.generate.top_k);
  CHECK(!config.generate.seed);
  CHECK(config.generate.max_tokens == 256);
}

TEST_CASE("sizes take every unit and fractions, and drop a part of a byte") {
  CHECK(parse_bytes("512B") == 512u);
  CHECK(parse_bytes("1KB") == 1000u);
  CHECK(parse_bytes("1KiB") == 1024u);
  CHECK(parse_bytes("3MB") == 3'000'000u);
  CHECK(parse_bytes("24MiB") == 24u << 20);
  CHECK(parse_bytes("1GB") == 1'000'000'000u);
  CHECK(parse_bytes("78GiB") == 78ull << 30);
  CHECK(parse_bytes("22.5 GiB") == 45ull << 29);
  CHECK(parse_bytes("2TB") == 2'000'000'000'000u);
  CHECK(parse_bytes("1TiB") == 1ull << 40);
  CHECK(parse_bytes("0.1KiB") == 102u);
  for (const char* bad : {"", "78", "GiB", "1gib", "1 ", "-1B", "1e3B", "1.B", "1.2.3B", "1  KB", ".KB",
                          "1.1234567GB", "1048576TiB", "99999999999999999999B"}) {
    CAPTURE(bad);
    CHECK(!parse_bytes(bad));
  }
  CHECK(format_bytes(512) == "512 B");
  CHECK(format_bytes(45ull << 29) == "22.50 GiB");
}

TEST_CASE("an unknown key is an error with its place and the nearest known key") {
  CHECK(error_of(kMinimal + "offload:\n  polcy: lru\n") ==
        "f.yaml:4:3: unknown key 'offload.polcy'; did you mean 'offload.policy'?");
  CHECK(error_of(kMinimal + "genrate: {seed: 1}\n") ==
        "f.yaml:3:1: unknown key 'genrate'; did you mean 'generate'?");
  CHECK(error_of(kMinimal + "gpu_budget: 1GiB\n") ==
        "f.yaml:3:1: unknown key 'gpu_budget'; did you mean 'memory.gpu_budget'?");
  CHECK(error_of(kMinimal + "offload: {depth: 2}\n") ==
        "f.yaml:3:11: unknown key 'offload.depth'; did you mean 'offload.prefetch.depth'?");
  CHECK(begin_of(error_of(kMinimal + "quantum_flux: 1\n"), 60) ==
        begin_of("f.yaml:3:1: unknown key 'quantum_flux'; the nearest known key is '", 60));
}

TEST_CASE("a wrong type or an impossible value is an error with its place and the accepted range") {
  const auto said = [](const std::string& yaml) { return error_of(kMinimal + yaml); };
  CHECK(said("offload: {prefetch: {depth: 9}}") ==
        "f.yaml:3:29: 'offload.prefetch.depth' must be a whole number from 1 to 8, but is 9");
  CHECK(said("offload: {prefetch: {depth: 1.5}}") ==
        "f.yaml:3:29: 'offload.prefetch.depth' must be a whole number from 1 to 8, but is 1.5");
  CHECK(said("offload: {prefetch: {depth: '2'}}") ==
        "f.yaml:3:29: 'offload.prefetch.depth' must be a whole number from 1 to 8, but is '2'");
  CHECK(said("offload: {policy: [lru]}") ==
        "f.yaml:3:19: 'offload.policy' must be one of static, lru, lfu, but is a list");
  CHECK(said("offload: 3") == "f.yaml:3:10: 'offload' must be a map of keys, but is 3");
  CHECK(
      said("offload: {resident: 1.01}") ==
      "f.yaml:3:21: 'offload.resident' must be auto, or a number from 0 to 1, or a list, each item a number "
      "from 0 to 1, but is 1.01");
  CHECK(said("offload:\n  resident:\n  - 0.5\n  - -1\n") ==
        "f.yaml:6:5: 'offload.resident[1]' must be a number from 0 to 1, but is -1");
  CHECK(said("offload: {prefetch: {enabled: yes}}") ==
        "f.yaml:3:31: 'offload.prefetch.enabled' must be true or false, but is 'yes'");
  CHECK(said("generate: {top_p: 0}") ==
        "f.yaml:3:19: 'generate.top_p' must be a number above 0 and at most 1, but is 0");
  CHECK(said("generate: {stop: [a, 1]}") ==
        "f.yaml:3:22: 'generate.stop[1]' must be a text that is not empty, but is 1; put it in quotes");
  CHECK(said("generate: {temperature: .nan}").starts_with("f.yaml:3:25: 'generate.temperature' must be"));
  CHECK(said("device: gpu") == "f.yaml:3:9: 'device' must be cpu, cuda or cuda:N, but is 'gpu'");
  CHECK(said("cpu: {threads: 0}") ==
        "f.yaml:3:16: 'cpu.threads' must be auto, or a whole number from 1 to 4096, but is 0");
  for (const char* pin : {"3", "3-1/*", "a/b", "*/", "1,/2", "-1/2"}) {
    CAPTURE(pin);
    CHECK(said("offload: {pin: ['" + std::string(pin) + "']}")
              .starts_with("f.yaml:3:17: 'offload.pin[0]' must be LAYERS/EXPERTS"));
  }
  for (const char* size : {"78", "0GiB", "1GiB/s", "[1GiB]", "2000000TiB"}) {
    CAPTURE(size);
    CHECK(error_of("model: {path: m}\nmemory:\n  gpu_budget: " + std::string(size))
              .starts_with("f.yaml:3:15: 'memory.gpu_budget' must be a size above 0 with a unit"));
  }
}

TEST_CASE("what is missing, doubled or contradictory is an error with its place") {
  const std::string memory = "memory: {gpu_budget: 1GiB, host_budget: 1GiB}\n";
  CHECK(begin_of(error_of(""), 21) == "f.yaml:1:1: no model:");
  CHECK(begin_of(error_of("# only a comment\n"), 21) == "f.yaml:1:1: no model:");
  CHECK(begin_of(error_of("- a\n"), 45) == "f.yaml:1:1: the file must be a map of keys, b");
  CHECK(begin_of(error_of(memory + "model: {dtype: bf16}"), 21) == "f.yaml:2:1: no model:");
  CHECK(error_of(memory + "model:\n  path: a\n  synthetic: scout\n") ==
        "f.yaml:4:14: 'model.path' and 'model.synthetic' are both set; keep one");
  CHECK(error_of("model: {path: m}\nmemory: {gpu_budget: 1GiB}")
            .starts_with("f.yaml:2:1: 'memory.host_budget' is missing; it must be a size"));
  CHECK(error_of(kMinimal + "device: cpu\ndevice: cuda\n") ==
        "f.yaml:4:1: duplicate key 'device'; it is already on line 3");
  CHECK(error_of(memory + "model: {path: m, path: n}\n") ==
        "f.yaml:2:18: duplicate key 'model.path'; it is already on line 2");
  CHECK(error_of(memory + "model: {path: m, layers: 2}")
            .starts_with("f.yaml:2:26: 'model.layers' is only for synthetic weights"));
  CHECK(error_of(kMinimal + "offload: {routing: {schedule: uniform}}")
            .starts_with("f.yaml:3:31: 'offload.routing.schedule' must be router for a checkpoint"));
  CHECK(error_of(kSynthetic + "offload: {routing: {schedule: uniform}}") == "");
  CHECK(error_of(kSynthetic + "offload: {routing: {schedule: zipf:0}}")
            .starts_with("f.yaml:3:31: 'offload.routing.schedule' must be router, uniform, or zipf:S"));
  CHECK(error_of(kMinimal + "---\ndevice: cpu\n").ends_with("more than one YAML document; keep one"));
}

TEST_CASE("broken YAML, and a file that cannot be read, are errors that name the file") {
  CHECK(error_of("model: {path: m\n").starts_with("f.yaml:2:1: this is not valid YAML: "));
  CHECK(error_of("model:\n\tpath: m\n").starts_with("f.yaml:2:"));  // the column is yaml-cpp's
  const YamlFile yaml("");
  const std::string missing = (yaml.folder / "missing.yaml").string();
  CHECK_THROWS_WITH_AS(
      load_config(missing),
      (missing + ": cannot be read: No such file or directory; check the path of the configuration file")
          .c_str(),
      ConfigError);
  CHECK_THROWS_WITH_AS(
      load_config(yaml.folder),
      (yaml.folder.string() + ": is a folder; check the path of the configuration file").c_str(),
      ConfigError);
}

TEST_CASE("hostile input is an error, not a crash") {
  const std::string deep(100'000, '[');
  CHECK(error_of(deep).find("this is not valid YAML") != std::string::npos);
  CHECK(error_of(kMinimal + "offload: &a {prefetch: *a}") != "");
  CHECK(error_of(kMinimal + "offload: {pin: &a [*a]}") != "");
  CHECK(error_of(kMinimal + "? [a, b]\n: 1\n").ends_with("a key must be a name, but is a list"));
  CHECK(error_of(kMinimal + "base: &b {a: 1}\n<<: *b\n").starts_with("f.yaml:3:1: unknown key 'base'"));
  CHECK(error_of(kMinimal + "offload: {pin: ['" + std::string(1'000'000, '1') + "']}").size() < 300);
  CHECK(error_of(kMinimal + std::string(100'000, 'k') + ": 1").size() < 300);
  CHECK(error_of(std::string("\xff\xfe\x00\x01", 4)) != "");
  // A byte-order mark and Windows line ends are fine.
  CHECK(error_of("\xef\xbb\xbf" + kMinimal + "device: cpu\r\noffload: {policy: lfu}\r\n") == "");
}

TEST_CASE("overrides change, add and clear keys, the last one winning") {
  const Config config = load(kMinimal + "generate: {top_k: 5}\noffload: {resident: 1}\n",
                             {"generate.top_k=", "offload.policy=lfu", "offload.policy=static", "device=cpu",
                              "offload.resident=[0.5, 1]", "offload.prefetch={depth: 3}",
                              "generate.stop=[\"=\", b]", "model.path=elsewhere"});
  CHECK(!config.generate.top_k);
  CHECK(config.offload.policy == OffloadConfig::Policy::static_);
  CHECK(config.device.kind == DeviceConfig::Kind::cpu);
  CHECK(std::get<std::vector<double>>(config.offload.resident).size() == 2);
  CHECK(config.offload.prefetch.depth == 3);
  CHECK(config.generate.stop == std::vector<std::string>{"=", "b"});
  CHECK(config.model.path == "elsewhere");  // as typed in a shell: relative to the working directory
  CHECK(load(kMinimal, {"model.path=", "model.synthetic=scout"}).model.synthetic == "scout");
}

TEST_CASE("an error in an override quotes the override") {
  CHECK(error_of(kMinimal, {"offload.polcy=lru"}) ==
        "--set offload.polcy=lru: unknown key 'offload.polcy'; did you mean 'offload.policy'?");
  CHECK(error_of(kMinimal, {"generate.max_tokens=0"}) ==
        "--set generate.max_tokens=0: 'generate.max_tokens' must be a whole number from 1 to 10485760, but "
        "is 0");
  CHECK(error_of(kMinimal, {"device"}) == "--set device: write it as key.path=value");
  CHECK(error_of(kMinimal, {"offload.pin=[\"1/2\", x]"})
            .starts_with("--set offload.pin=[\"1/2\", x]: 'offload.pin[1]' must be LAYERS/EXPERTS"));
  CHECK(error_of(kMinimal, {"offload.pin=["}).starts_with("--set offload.pin=[: this is not valid YAML: "));
  CHECK(error_of(kMinimal, {"model.synthetic=scout"}) ==
        "--set model.synthetic=scout: 'model.path' and 'model.synthetic' are both set; keep one (\"--set "
        "key=\" "
        "clears the other)");
  CHECK(
      error_of(kMinimal, {"memory.host_budget="}).starts_with("f.yaml:2:1: 'memory.host_budget' is missing"));
}
