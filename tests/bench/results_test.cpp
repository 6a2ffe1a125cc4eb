#include <doctest/doctest.h>

#include <algorithm>
#include <random>

#include "bench/compare.h"
#include "bench/report.h"
#include "bench/results_file.h"
#include "bench/runner.h"
#include "bench/statistics.h"
#include "bench/table.h"
#include "tests/bench/sweep_files.h"

namespace lighter::bench {
namespace {

using test::PretendedBench;

// A sweep of three points besides the baseline; slower: of the point with half resident.
Json results_of(double slower = 1, double noise = 0, const std::string& name = "test") {
  const test::TemporaryFolder folder;
  Sweep sweep =
      test::sweep_of(folder, test::kSweepHead + "points:\n  - {models: [large], resident: [0, 0.5, 1]}\n");
  sweep.name = name;
  PretendedBench bench;
  bench.noise = noise;
  bench.step_s = [&](const Point& point) {
    return point.settings.value("resident", -1.0) == 0.5 ? 0.01 * slower : 0.01;
  };
  RunnerOptions options;
  options.results = folder.path / "results.json";
  return run_sweep(sweep, bench, options).results;
}

TEST_CASE("percentiles lie where a sorted list has them, and between two values on the line") {
  CHECK(percentile({3, 1, 2}, 0.5) == 2);
  CHECK(percentile({4, 1, 2, 3}, 0.5) == 2.5);
  CHECK(percentile({7}, 0.99) == 7);
  CHECK(percentile({0, 10}, 0.9) == doctest::Approx(9));
  std::mt19937 engine(std::random_device{}());
  std::vector<double> values(1001);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(i);
  std::ranges::shuffle(values, engine);
  for (int share = 0; share <= 100; ++share)
    CHECK(percentile(values, share / 100.0) == doctest::Approx(10 * share));
  const Summary summary = summarize(values);
  CHECK(summary.median == 500);
  CHECK(summary.spread() == doctest::Approx(2));
}

TEST_CASE("nothing changed: no change is reported, whatever the noise") {
  for (int i = 0; i < 20; ++i) {
    const Json comparison = compare_results(results_of(1, 0.05), results_of(1, 0.05));
    for (const Json& change : comparison["changes"]) {
      CHECK(std::abs(change["change"].get<double>()) > change["noise"].get<double>());
      CHECK(std::abs(change["change"].get<double>()) < 0.05);
    }
  }
  CHECK(compare_results(results_of(), results_of())["changes"].empty());
}

TEST_CASE("a point that became slower is reported as worse, and only that one") {
  const Json comparison = compare_results(results_of(), results_of(1.5));
  REQUIRE(comparison["changes"].size() == 3);  // decode, prefill, first token
  for (const Json& change : comparison["changes"]) {
    CHECK(change["label"] == "large, 50 % resident");
    CHECK(change["better"] == false);
  }
  CHECK(comparison["changes"][0]["change"].get<double>() == doctest::Approx(1 / 1.5 - 1));
  CHECK(comparison["unchanged"] == 3);
  const std::string text = comparison_markdown(comparison);
  CHECK(text.find("| large, 50 % resident | decode tok/s | 100 | 66.67 | **-33.3 %** | ± 1.0 % | worse |") !=
        std::string::npos);
}

TEST_CASE("points that only one file has, and those that broke, are named") {
  Json before = results_of(), after = results_of();
  before["points"].erase(1);
  for (const char* name : {"decode_tokens_per_s", "prefill_tokens_per_s"}) after["points"][3][name] = nullptr;
  after["points"][3]["status"] = "failed";
  const Json comparison = compare_results(before, after);
  CHECK(comparison["only_in_b"] == Json::array({"large, 0 % resident"}));
  CHECK(comparison["broken"].size() == 1);
  CHECK(comparison_markdown(comparison).find("Measured before, failed after: ") != std::string::npos);
}

TEST_CASE("two machines are noted") {
  Json after = results_of();
  after["machine"]["cpu"] = "another";
  const Json comparison = compare_results(results_of(), after);
  CHECK(comparison["notes"] == Json::array({"the machines differ: cpu \"pretended\" and \"another\""}));
}

TEST_CASE("more memory is a change, by more than 1 %") {
  Json after = results_of();
  after["points"][3]["memory"]["device_peak_bytes"] = 1009;
  CHECK(compare_results(results_of(), after)["changes"].empty());
  after["points"][3]["memory"]["device_peak_bytes"] = 1020;
  const Json changes = compare_results(results_of(), after)["changes"];
  REQUIRE(changes.size() == 1);
  CHECK(changes[0]["metric"] == "device_peak_bytes");
  CHECK(changes[0]["better"] == false);
  CHECK(changes[0]["change"].get<double>() == doctest::Approx(0.02));
}

TEST_CASE("what was measured with other routing, or once only, is noted") {
  Json after = results_of();
  for (int i : {1, 3}) after["points"][i]["facts"]["routing"] = "trace x";
  after["repeats"] = 1;
  const Json comparison = compare_results(results_of(), after);
  CHECK(comparison["notes"] ==
        Json::array({"a single repeat shows no noise, so only the baseline's drift counts as such",
                     "2 points differ in routing: null and \"trace x\""}));
}

TEST_CASE("results without a common point are not called unchanged") {
  Json after = results_of();
  for (Json& point : after["points"]) point["key"] = "another " + point["key"].get<std::string>();
  const std::string text = comparison_markdown(compare_results(results_of(), after));
  CHECK_MESSAGE(text.starts_with("The two have no point in common, so nothing was compared"), text);
  CHECK(text.find("Nothing changed") == text.npos);
}

TEST_CASE("remarks say what makes the figures doubtful, and nothing of a sound sweep") {
  Json results = results_of();
  CHECK(results_remarks(results).empty());
  results["drift"]["share"] = 0.2;
  results["left_behind_bytes"] = uint64_t{3} << 30;
  for (Json& point : results["points"]) {
    if (point["round"].is_null()) continue;
    point["status"] = "failed";
  }
  const auto remarks = results_remarks(results);
  REQUIRE(remarks.size() == 3);
  CHECK(remarks[0].starts_with("The baseline, small, could not be measured, so there are no penalties"));
  CHECK(remarks[1].starts_with("The baseline drifted by 20.0 %"));
  CHECK(remarks[2].starts_with("With nothing loaded, 3.00 GiB more memory is in use"));
}

TEST_CASE("the baseline's row is the round in the middle by speed, whichever it is, and its penalty is 1") {
  Json results = results_of();
  double speed[] = {90, 120, 100};
  int round = 0;
  for (Json& point : results["points"]) {
    if (!point["round"].is_null()) point["decode_tokens_per_s"]["median"] = speed[round++];
  }
  complete_results(results);
  CHECK(results_markdown(results).find("| all | **100** | 1.00 × |") != std::string::npos);
  results["points"][0]["status"] = "failed";
  results["points"][0]["error"] = {{"kind", "DeviceError"}, {"message", "too early"}};
  CHECK(results_markdown(results).find("too early") == std::string::npos);
  CHECK(results_markdown(results).find("| all | **120** |") != std::string::npos);
}

TEST_CASE("routing that is not the router's is named above the table") {
  Json results = results_of();
  for (Json& point : results["points"]) point["facts"]["routing"] = "trace books.trace";
  CHECK(results_markdown(results).find(". Routing: trace books.trace.\n") != std::string::npos);
  for (Json& point : results["points"]) point["facts"]["routing"] = "router";
  CHECK(results_markdown(results).find("Routing") == std::string::npos);
}

TEST_CASE("the CSV has a row a point and as many fields as its head") {
  Json results = results_of();
  results["points"][1]["label"] = "with, \"quotes\"";
  const std::string csv = results_csv(results);
  CHECK(std::ranges::count(csv, '\n') == 1 + 6);
  CHECK(csv.find("\"with, \"\"quotes\"\"\"") != std::string::npos);
  const std::string head = csv.substr(0, csv.find('\n'));
  const size_t last = csv.rfind('\n', csv.size() - 2) + 1;
  CHECK(std::ranges::count(head, ',') == std::ranges::count(csv.substr(last), ','));
}

TEST_CASE("the table has one row for the baseline, and the message of what failed") {
  Json results = results_of();
  results["points"][1]["status"] = "failed";
  results["points"][1]["error"] = {{"kind", "CapacityError"}, {"message", "two\nlines | a bar"}};
  const std::string table = results_markdown(results);
  CHECK(table.find("two lines \\| a bar") != std::string::npos);
  size_t rows = 0;
  for (size_t at = table.find("\n| "); at != table.npos; at = table.find("\n| ", at + 1)) ++rows;
  CHECK(rows == 1 + 1 + 3);
}

TEST_CASE("the text of results reads back as what it was") {
  const Json results = results_of(1.2, 0.1);
  CHECK(Json::parse(results_text(results)) == results);
}

TEST_CASE("a file that is not what a sweep writes is refused, whatever is wrong with it") {
  const test::TemporaryFolder folder;
  const auto refused = [&](const std::function<void(Json&)>& damage) {
    Json results = results_of();
    damage(results);
    CHECK_THROWS_AS(read_results(folder.write("results.json", results.dump())), ConfigError);
  };
  const Json good = results_of();
  CHECK(read_results(folder.write("results.json", good.dump())) == good);
  refused([](Json& r) { r["version"] = kResultsVersion + 1; });
  refused([](Json& r) { r["format"] = "other"; });
  refused([](Json& r) { r["points"] = 3; });
  refused([](Json& r) { r["points"].push_back(Json::object()); });
  refused([](Json& r) { r["points"].push_back(3); });
  refused([](Json& r) { r["points"][1].erase("key"); });
  refused([](Json& r) { r["points"][1]["decode_tokens_per_s"] = 3; });
  refused([](Json& r) { r["machine"].erase("rates"); });
  refused([](Json& r) { r["points"][1]["memory"].erase("host_peak_bytes"); });
  refused([](Json& r) { r["points"][1]["facts"].erase("routing"); });
  refused([](Json& r) { r.erase("complete"); });
  CHECK_THROWS_AS(read_results(folder.write("results.json", "{")), ConfigError);
  CHECK_THROWS_AS(read_results(folder.path), ConfigError);
  CHECK_THROWS_AS(read_results(folder.path / "none"), ConfigError);
}

TEST_CASE("the report holds data and library, and no text of the data can end its script") {
  const std::string evil = "</script><!--<script>";
  const std::string page = results_html(results_of(1, 0, evil));
  CHECK(page.find(evil) == page.npos);
  CHECK(page.find("\\u003c/script>") != page.npos);
  CHECK(page.find("Chart.js v3") != page.npos);
  CHECK(page.find("/*RESULTS*/") == page.npos);
  CHECK(page.find("</html>") != page.npos);
}

}  // namespace
}  // namespace lighter::bench
