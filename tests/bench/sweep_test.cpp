#include "bench/sweep.h"

#include <algorithm>
#include <set>

#include "offload/trace.h"
#include "runtime/config/config.h"
#include "runtime/config/config_keys.h"
#include "tests/bench/sweep_files.h"

namespace lighter::bench {
namespace {

using test::kSweepHead;
using test::sweep_error;
using test::sweep_of;

std::vector<std::string> labels(const Sweep& sweep) {
  std::vector<std::string> all;
  for (const Point& point : sweep.points) all.push_back(point.label);
  return all;
}

TEST_CASE("a sweep measures every combination, with the baseline before, between and after") {
  const test::TemporaryFolder folder;
  const Sweep sweep = sweep_of(
      folder, kSweepHead + "points:\n  - {models: [large], experts: [int8, int4], resident: [0, 0.5]}\n");
  CHECK(labels(sweep) ==
        std::vector<std::string>{"small", "large, int8, 0 % resident", "large, int8, 50 % resident", "small",
                                 "large, int4, 0 % resident", "large, int4, 50 % resident", "small"});
  CHECK(sweep.points[0].round == Round::first);
  CHECK(sweep.points[3].round == Round::middle);
  CHECK(sweep.points[6].round == Round::last);
  CHECK(sweep.points[2].overrides == std::vector<std::string>{"model.experts=int8", "offload.resident=0.5"});
  CHECK(sweep.points[0].overrides == std::vector<std::string>{"offload.resident=1"});
  CHECK(sweep.repeats == 3);
}

TEST_CASE("the baseline is measured with every workload, and the middle parts no load") {
  const test::TemporaryFolder folder;
  const Sweep sweep = sweep_of(
      folder,
      kSweepHead + "points:\n  - {models: [large], prompt_tokens: [8, 16, 32], generated_tokens: 4}\n");
  REQUIRE(sweep.points.size() == 12);
  for (const int64_t tokens : {8, 16, 32}) {
    CHECK(std::ranges::count_if(sweep.points, [&](const Point& point) {
            return point.round != Round::none && point.workload == Workload{tokens, 4, 1};
          }) == 3);
  }
  // The large model's three workloads stay together.
  for (int i = 3; i < 6; ++i) CHECK(sweep.points[i].model == "large");
  CHECK(sweep.points[4].label == "large, 16 + 4 tokens");
}

TEST_CASE("a depth of prefetch becomes the two keys that say it") {
  const test::TemporaryFolder folder;
  const Sweep sweep = sweep_of(
      folder, kSweepHead + "points:\n  - {models: [large], prefetch_depth: [0, 2], policy: static}\n");
  CHECK(sweep.points[1].overrides ==
        std::vector<std::string>{"offload.policy=static", "offload.prefetch.enabled=false"});
  // The baseline stands between the two loads.
  CHECK(sweep.points[3].overrides == std::vector<std::string>{"offload.policy=static",
                                                              "offload.prefetch.enabled=true",
                                                              "offload.prefetch.depth=2"});
}

TEST_CASE("a point that stands in two blocks is measured once, and ids differ") {
  const test::TemporaryFolder folder;
  const Sweep sweep = sweep_of(folder, kSweepHead +
                                           "points:\n  - {models: [large], resident: [0, 0.5]}\n"
                                           "  - {models: [large], resident: [0.5, 1]}\n");
  CHECK(sweep.points.size() == 3 + 3);
  std::set<std::string> ids;
  for (const Point& point : sweep.points) ids.insert(point.id);
  CHECK(ids.size() == sweep.points.size());
}

TEST_CASE("a point's id follows the configuration's text, its key does not") {
  const test::TemporaryFolder folder;
  const std::string text = kSweepHead + "points:\n  - {models: [large], resident: 0.5}\n";
  const Sweep before = sweep_of(folder, text);
  const Sweep same = sweep_of(folder, text);
  folder.write("model.yaml", test::kModelFile + "cpu: {threads: 3}\n");
  const Sweep after = load_sweep(folder.path / "sweep.yaml");
  CHECK(before.points[1].id == same.points[1].id);
  CHECK(before.points[1].id != after.points[1].id);
  CHECK(before.points[1].key == after.points[1].key);
}

TEST_CASE("mistakes in a sweep are found with their place, before anything runs") {
  CHECK(sweep_error("name: x\n") == "sweep.yaml:1:1: 'models' is missing");
  CHECK(sweep_error("- 1\n") == "sweep.yaml:1:1: the file must be a map of keys, but is a list");
  CHECK(sweep_error(kSweepHead + "repeat: 3\npoints:\n  - {models: [large]}\n") ==
        "sweep.yaml:6:1: unknown key 'repeat'; did you mean 'repeats'?");
  CHECK(sweep_error(kSweepHead + "repeats: 0\npoints:\n  - {models: [large]}\n") ==
        "sweep.yaml:6:10: 'repeats' must be a whole number from 1 to 1000, but is 0");
  CHECK(sweep_error(kSweepHead + "points:\n  - {models: [large], residnt: 1}\n") ==
        "sweep.yaml:7:23: unknown key 'points[0].residnt'; did you mean 'points[0].resident'?");
  CHECK(sweep_error(kSweepHead + "points:\n  - {models: [large], resident: [0, 2]}\n") ==
        "sweep.yaml:7:37: 'points[0].resident[1]' must be auto, or a number from 0 to 1, but is 2");
  CHECK(sweep_error(kSweepHead + "points:\n  - {models: [huge]}\n") ==
        "sweep.yaml:7:14: no model is called 'huge'; there are: small, large");
  CHECK(sweep_error(kSweepHead + "points:\n  - {models: [large], resident: []}\n") ==
        "sweep.yaml:7:33: 'resident' is an empty list");
  CHECK(sweep_error(kSweepHead + "points: [{models: []}]\n") == "sweep.yaml:6:19: 'models' is an empty list");
  CHECK(sweep_error(kSweepHead + "points: []\n") ==
        "sweep.yaml:6:9: 'points' must be a list of maps, but is an empty list");
  CHECK(sweep_error(kSweepHead + "points: 3\n") ==
        "sweep.yaml:6:9: 'points' must be a list of maps, but is 3");
  CHECK(sweep_error(kSweepHead + "points:\n  - {models: [large]}\nname: y\n") ==
        "sweep.yaml:8:1: duplicate key 'name'");
  CHECK(sweep_error("name: x\nbaseline: a\nmodels: [{name: a, config: none.yaml}]\npoints: [{models: [a]}]\n")
            .find("none.yaml: cannot be read") != std::string::npos);
}

TEST_CASE("a configuration that cannot be is named with its model before anything runs") {
  const std::string error =
      sweep_error(kSweepHead + "points:\n  - {models: [large], set: [model.layers=3], resident: 1}\n");
  CHECK(
      error.starts_with("sweep.yaml:7:5: the model 'large' cannot be configured so: --set model.layers=3: "));
}

TEST_CASE("an axis takes the values that the configuration knows, auto among them") {
  const test::TemporaryFolder folder;
  for (const char* key : {"offload.miss", "offload.policy", "model.format"}) {
    const std::string axis = std::string(key).substr(std::string(key).rfind('.') + 1);
    for (const std::string& word : find_key(key)->forms.front().words) {
      const Sweep sweep =
          sweep_of(folder, kSweepHead + "points:\n  - {models: [large], " + axis + ": " + word + "}\n");
      CHECK(sweep.points[2].overrides == std::vector<std::string>{std::string(key) + "=" + word});
    }
    const std::string error =
        sweep_error(kSweepHead + "points:\n  - {models: [large], " + axis + ": [int7]}\n");
    CHECK_MESSAGE(error.starts_with("sweep.yaml:7:"), error);
    CHECK_MESSAGE(error.find("'points[0]." + axis + "[0]' must be") != error.npos, error);
  }
  const Sweep mixed = sweep_of(folder, kSweepHead + "points:\n  - {models: [large], resident: [0, auto]}\n");
  CHECK(mixed.points[3].overrides == std::vector<std::string>{"offload.resident=auto"});
}

TEST_CASE("a batch loads the model for as many sequences, the baseline too") {
  const test::TemporaryFolder folder;
  const Sweep sweep = sweep_of(folder, kSweepHead + "points:\n  - {models: [large], batch: [1, 3]}\n");
  REQUIRE(sweep.points.size() == 3 * 2 + 2);
  for (const Point& point : sweep.points) {
    const bool three = std::ranges::find(point.overrides, "memory.sequences=3") != point.overrides.end();
    CHECK(three == (point.workload.batch == 3));
  }
}

TEST_CASE("more tokens than the context holds are refused, whichever model lacks the room") {
  CHECK(sweep_error(kSweepHead + "points:\n  - {models: [large], prompt_tokens: [8, 9000]}\n") ==
        "sweep.yaml:7:38: 9000 + 32 tokens are more than the model 'large' has room for: its memory.context "
        "is 8192; "
        "raise it, or ask for fewer");
  CHECK(sweep_error(kSweepHead +
                    "points:\n  - {models: [large], prompt_tokens: 9000, set: [memory.context=10000]}\n")
            .starts_with("sweep.yaml:2:11: 9000 + 32 tokens are more than the model 'small' has room for"));
}

TEST_CASE("where no baseline is named it is Llama-3.1-8B in memory, on the first model's device and budget") {
  const std::string models =
      "name: test\nmodels:\n  - name: large\n    config: model.yaml\n"
      "    set: [model.experts=int4, model.head=int8, memory.gpu_budget=3GiB, 'offload.resident=[0.5, 1]', "
      "'offload.pin=[\"90/*\"]']\n";
  const test::TemporaryFolder folder;
  const Sweep sweep = sweep_of(folder, models + "points: [{models: [large]}]\n");
  REQUIRE(sweep.points.size() == 4);
  CHECK(sweep.baseline == "Llama-3.1-8B bf16");
  CHECK(sweep.points[0].label == sweep.baseline);
  CHECK(sweep.points[0].round == Round::first);
  const Config config = load_config(sweep.points[0].config, sweep.points[0].overrides);
  CHECK(config.model.synthetic == "llama-3.1-8b");
  CHECK(config.model.path.empty());
  CHECK(config.model.experts == SliceEncoding::dense);
  CHECK(config.model.head == SliceEncoding::dense);
  CHECK(std::get<double>(config.offload.resident) == 1);
  CHECK(config.offload.pin.empty());
  CHECK_FALSE(config.offload.prefetch.enabled);
  CHECK(config.memory.gpu_budget_bytes == uint64_t{3} << 30);

  // A model of that name is taken as it is.
  const Sweep named = sweep_of(folder, models +
                                           "  - {name: Llama-3.1-8B bf16, config: model.yaml}\n"
                                           "points: [{models: [large]}]\n");
  CHECK(named.points[0].overrides.empty());

  // It has no tokenizer.
  CHECK_THROWS_WITH_AS(sweep_of(folder, models + "prompt: {file: model.yaml}\npoints: [{models: [large]}]\n"),
                       doctest::Contains("prompts from a file need a tokenizer"), ConfigError);
}

TEST_CASE("a trace that is none, or that nothing could follow, is a mistake of the sweep") {
  const std::string points = "points: [{models: [large]}]\n";
  CHECK(sweep_error(kSweepHead + points + "trace: model.yaml\n").starts_with("sweep.yaml:7:8: "));
  CHECK(sweep_error(kSweepHead + points + "trace: model.yaml\n").find("not a routing trace") !=
        std::string::npos);

  const test::TemporaryFolder folder;
  offload::TraceWriter writer(folder.path / "one.trace", {"m", "bf16", {0}, 2, 1, 1, 8, {}});
  writer.write(std::vector<uint32_t>{0}, std::vector<uint16_t>{1, 0, 0});
  writer.finish();
  const std::string with_trace = points + "trace: one.trace\n";
  CHECK_THROWS_WITH_AS(sweep_of(folder, kSweepHead + with_trace),
                       doctest::Contains("sweep.yaml:7:8: a recorded trace replaces the router of synthetic"),
                       ConfigError);
  const std::string synthetic = "points: [{models: [large], set: [model.path=, model.synthetic=scout]}]\n";
  CHECK(sweep_of(folder, kSweepHead + synthetic + "trace: one.trace\n").points.size() == 4);
}

TEST_CASE("a point's id follows the text of its prompts and the rates that its bound rests on") {
  const test::TemporaryFolder folder;
  folder.write("prompts.txt", "one");
  const std::string text = kSweepHead + "points: [{models: [large]}]\nprompt: {file: prompts.txt}\n";
  const std::string before = sweep_of(folder, text).points[1].id;
  CHECK(before == sweep_of(folder, text).points[1].id);
  CHECK(before != sweep_of(folder, text + "rates: {link_gb_per_s: 20}\n").points[1].id);
  folder.write("prompts.txt", "two");
  CHECK(before != sweep_of(folder, text).points[1].id);
}

TEST_CASE("prompts and traces that are not there are named with their place") {
  const std::string points = "points: [{models: [large]}]\n";
  CHECK(sweep_error(kSweepHead + points + "prompt: {file: none.txt}\n").starts_with("sweep.yaml:7:16: "));
  CHECK(sweep_error(kSweepHead + points + "trace: none.trace\n").starts_with("sweep.yaml:7:8: "));
}

TEST_CASE("the sweeps in configs can be read") {
  for (const char* name : {"bench-demo.yaml", "bench-scout-h100.yaml", "bench-24gb.yaml"}) {
    CAPTURE(name);
    const Sweep sweep = load_sweep(std::filesystem::path(LIGHTER_SOURCE_DIR) / "configs" / name);
    CHECK(sweep.points.front().round == Round::first);
    CHECK(sweep.points.back().round == Round::last);
    CHECK(sweep.points.size() > 6);
  }
}

}  // namespace
}  // namespace lighter::bench
