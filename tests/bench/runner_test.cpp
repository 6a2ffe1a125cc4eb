#include "bench/runner.h"

#include <algorithm>

#include "bench/results_file.h"
#include "tests/bench/sweep_files.h"

namespace lighter::bench {
namespace {

using test::PretendedBench;

struct Rig {
  test::TemporaryFolder folder;
  Sweep sweep;
  PretendedBench bench;
  RunnerOptions options;

  explicit Rig(const std::string& points = "points:\n  - {models: [large], resident: [0, 0.25, 0.5, 0.75]}\n")
      : sweep(test::sweep_of(folder, test::kSweepHead + points)) {
    options.results = folder.path / "results.json";
  }
  Outcome run() { return run_sweep(sweep, bench, options); }
  Json on_disk() const { return read_results(options.results); }
};

TEST_CASE("every point is warmed up, repeated and written down, in order") {
  Rig rig;
  const Outcome outcome = rig.run();
  CHECK(outcome.measured == 7);
  CHECK(rig.bench.runs == 7 * (1 + 3) + 2);  // and one for each model's recorded step
  const Json results = rig.on_disk();
  CHECK(results["complete"] == true);
  REQUIRE(results["points"].size() == 7);
  for (size_t i = 0; i < 7; ++i) {
    CHECK(results["points"][i]["id"] == rig.sweep.points[i].id);
    CHECK(results["points"][i]["decode_tokens_per_s"]["median"].get<double>() == doctest::Approx(100));
    CHECK(results["points"][i]["runs"].size() == 3);
    CHECK(results["points"][i]["inter_token_ms"]["count"] == 3 * 31);
  }
}

TEST_CASE("a point that fails is recorded with its message and the sweep goes on") {
  Rig rig;
  rig.bench.on_load = [](const Point& point) {
    if (point.settings.value("resident", 0.0) == 0.25) throw CapacityError("too small by 3 bytes");
  };
  rig.bench.on_run = [](const Point& point) {
    if (point.settings.value("resident", 0.0) == 0.75) throw DeviceError("fell off the bus");
  };
  const Outcome outcome = rig.run();
  CHECK(outcome.failed == 2);
  CHECK(outcome.measured == 5);
  const Json results = rig.on_disk();
  CHECK(results["complete"] == true);
  CHECK(results["points"][2]["status"] == "failed");
  CHECK(results["points"][2]["error"] ==
        Json{{"kind", "CapacityError"}, {"message", "too small by 3 bytes"}});
  CHECK(results["points"][2]["penalty"].is_null());
  CHECK(results["points"][5]["error"]["kind"] == "DeviceError");
  CHECK(results["points"][6]["status"] == "measured");
}

TEST_CASE("Ctrl-C keeps what is done, and resume measures only what is left") {
  Rig rig;
  rig.bench.on_run = [&](const Point& point) {
    if (point.settings.value("resident", 0.0) == 0.5) throw Interrupted();
  };
  const Outcome stopped = rig.run();
  CHECK(stopped.interrupted);
  CHECK(rig.on_disk()["interrupted"] == true);
  CHECK(rig.on_disk()["complete"] == false);
  REQUIRE(rig.on_disk()["points"].size() == 4);
  const Json first = rig.on_disk()["points"][0];

  rig.bench.on_run = [](const Point&) {};
  rig.bench.runs = 0;
  rig.options.resume = true;
  const Outcome resumed = rig.run();
  CHECK(resumed.taken_over == 4);
  CHECK(resumed.measured == 3);
  CHECK(rig.bench.runs == 3 * 4 + 2);
  CHECK(rig.bench.rates_measured == 1);
  const Json results = rig.on_disk();
  CHECK(results["complete"] == true);
  CHECK(results["interrupted"] == false);
  CHECK(results["points"].size() == 7);
  CHECK(results["points"][0]["runs"] == first["runs"]);
}

TEST_CASE("a flag that is set between points stops the sweep too, without losing what was resumed") {
  Rig rig;
  rig.run();
  std::atomic<bool> interrupted{true};
  rig.options.interrupted = &interrupted;
  rig.options.resume = true;
  Json partial = rig.on_disk();
  partial["points"].erase(1);
  write_atomically(rig.options.results, results_text(partial));
  const Outcome outcome = rig.run();
  CHECK(outcome.interrupted);
  CHECK(outcome.measured == 0);
  CHECK(rig.on_disk()["points"].size() == 6);
}

TEST_CASE("resume tries again what had failed, and drops what the sweep no longer has") {
  Rig rig;
  rig.bench.on_load = [](const Point& point) {
    if (point.settings.value("resident", 0.0) == 0.25) throw CapacityError("not today");
  };
  rig.run();
  rig.bench.on_load = [](const Point&) {};
  rig.options.resume = true;
  std::erase_if(rig.sweep.points,
                [](const Point& point) { return point.settings.value("resident", 0.0) == 0.75; });
  const Outcome outcome = rig.run();
  CHECK(outcome.measured == 1);
  CHECK(outcome.failed == 0);
  CHECK(rig.on_disk()["points"].size() == 6);
}

TEST_CASE("a model stays loaded while only the workload changes") {
  Rig rig("points:\n  - {models: [large], resident: [0, 0.5], prompt_tokens: [4, 8]}\n");
  rig.run();
  CHECK(rig.bench.loads == 5 + 2);  // the baseline three times, the large model twice; then to record
  CHECK(rig.on_disk()["points"][1]["load_kept"] == true);
}

TEST_CASE(
    "a step of each model is recorded when everything is measured, and what cannot be recorded is no "
    "failure") {
  Rig rig;
  int timed = 0;
  rig.bench.on_run = [&](const Point&) { ++timed; };
  rig.bench.on_record = [&](const Point& point) {
    CHECK(timed >= 7 * 4);
    if (point.model == "large") throw DeviceError("no recorder");
  };
  const Outcome outcome = rig.run();
  CHECK(outcome.failed == 0);
  const Json points = rig.on_disk()["points"];
  CHECK(points[0]["timeline"]["events"].size() == 1);
  CHECK(points[0]["timeline"]["note"].is_null());
  int told = 0;
  for (size_t i = 1; i < points.size(); ++i) {
    if (points[i]["timeline"].is_null()) continue;
    ++told;
    CHECK(points[i]["timeline"]["events"].empty());
    CHECK(points[i]["timeline"]["note"] == "no recorder");
  }
  CHECK(told == 1);
  CHECK(rig.on_disk()["complete"] == true);
}

TEST_CASE("what stays behind between points is seen") {
  Rig rig;
  rig.run();
  CHECK(rig.on_disk()["left_behind_bytes"] == 0);
  Rig leaking;
  leaking.bench.leak_bytes = 100;
  leaking.run();
  CHECK(leaking.on_disk()["left_behind_bytes"] == 600);  // the first load is not counted
  CHECK(leaking.on_disk()["points"][2]["memory"]["in_use_before_bytes"] == 5200);
}

TEST_CASE("the drift of the baseline is reported, and penalties follow its median") {
  Rig rig;
  rig.bench.step_s = [](const Point& point) {
    switch (point.round) {
      case Round::first:
        return 0.010;
      case Round::middle:
        return 0.011;
      case Round::last:
        return 0.012;
      default:
        return 0.022;
    }
  };
  rig.run();
  const Json results = rig.on_disk();
  CHECK(results["drift"]["share"].get<double>() == doctest::Approx((1 / 0.010 - 1 / 0.012) * 0.011));
  CHECK(results["points"][1]["penalty"].get<double>() == doctest::Approx(2));
  CHECK(results["points"][0]["penalty"].get<double>() == doctest::Approx(0.010 / 0.011));
}

TEST_CASE("an unfinished sweep is not lost to a run without resume, a finished one is replaced") {
  Rig rig;
  rig.run();
  rig.bench.on_run = [&](const Point& point) {
    if (point.settings.value("resident", 0.0) == 0.5) throw Interrupted();
  };
  CHECK(rig.run().interrupted);
  const Json left = rig.on_disk();
  CHECK_THROWS_WITH_AS(
      rig.run(), doctest::Contains("has left 4 measured points; go on with it with --resume"), ConfigError);
  CHECK(rig.on_disk() == left);
  rig.folder.write("results.json", "[1, 2, 3]");
  CHECK_THROWS_WITH_AS(rig.run(),
                       doctest::Contains("was not written by `lighter bench`; so that nothing is lost"),
                       ConfigError);
  // Where nothing was measured there is nothing to lose.
  rig.bench.on_run = [](const Point&) { throw Interrupted(); };
  std::filesystem::remove(rig.options.results);
  CHECK(rig.run().interrupted);
  CHECK(rig.run().interrupted);
}

TEST_CASE("resume refuses another sweep's results, and another machine's") {
  Rig rig;
  rig.run();
  rig.options.resume = true;
  const Json left = rig.on_disk();
  Rig other("points:\n  - {models: [large], resident: [0.1]}\n");
  other.sweep.repeats = 1;
  for (Point& point : other.sweep.points) point.id += "'";
  other.options = rig.options;
  CHECK_THROWS_WITH_AS(other.run(), doctest::Contains("has none of this sweep's points"), ConfigError);
  CHECK(rig.on_disk() == left);

  Json elsewhere = left;
  elsewhere["machine"]["gpu"] = "H100";
  write_atomically(rig.options.results, results_text(elsewhere));
  CHECK_THROWS_WITH_AS(
      rig.run(),
      doctest::Contains(
          "another machine (H100, pretended with 2 cores) than this one (pretended with 2 cores)"),
      ConfigError);
}

TEST_CASE("resume keeps what was known of memory left behind when it loads nothing") {
  Rig rig;
  rig.bench.leak_bytes = 100;
  rig.run();
  rig.options.resume = true;
  rig.run();
  CHECK(rig.on_disk()["left_behind_bytes"] == 600);
}

TEST_CASE("resume refuses what is no results file") {
  Rig rig;
  rig.options.resume = true;
  rig.folder.write("results.json", "{\"points\": []}");
  CHECK_THROWS_WITH_AS(rig.run(), doctest::Contains("was not written by `lighter bench`"), ConfigError);
  rig.folder.write("results.json", "{");
  CHECK_THROWS_WITH_AS(rig.run(), doctest::Contains("is not valid JSON"), ConfigError);
}

}  // namespace
}  // namespace lighter::bench
