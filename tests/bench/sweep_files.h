// Sweeps and results for the tests of bench/: files in a folder of their own, and a machine that only
// pretends.
#pragma once

#include <doctest/doctest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <random>
#include <string>

#include "bench/measure.h"
#include "bench/sweep.h"
#include "runtime/error.h"

namespace lighter::test {

struct TemporaryFolder {
  std::filesystem::path path;

  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "lighter-bench-XXXXXX").string();
    REQUIRE(mkdtemp(name.data()) != nullptr);
    path = name;
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  ~TemporaryFolder() { std::filesystem::remove_all(path); }

  std::filesystem::path write(const std::string& name, const std::string& text) const {
    std::ofstream(path / name) << text;
    return path / name;
  }
};

inline const std::string kModelFile = "model: {path: m}\nmemory: {gpu_budget: 1GiB, host_budget: 1GiB}\n";
inline const std::string kSweepHead =
    "name: test\nbaseline: small\nmodels:\n  - {name: small, config: model.yaml, set: [offload.resident=1]}\n"
    "  - {name: large, config: model.yaml}\n";

inline bench::Sweep sweep_of(const TemporaryFolder& folder, const std::string& text) {
  folder.write("model.yaml", kModelFile);
  return bench::load_sweep(folder.write("sweep.yaml", text));
}

// The message of the ConfigError, without the folder; "" if there was none.
inline std::string sweep_error(const std::string& text) {
  const TemporaryFolder folder;
  try {
    sweep_of(folder, text);
  } catch (const ConfigError& error) {
    const std::string message = error.what(), prefix = folder.path.string() + "/";
    return message.starts_with(prefix) ? message.substr(prefix.size()) : message;
  }
  return "";
}

// Takes as long for a token as `step_s` says for the point, with a little noise, and notes what is asked of
// it.
class PretendedBench : public bench::Workbench, private bench::LoadedPoint {
 public:
  std::function<double(const bench::Point&)> step_s = [](const bench::Point&) { return 0.01; };
  std::function<void(const bench::Point&)> on_load = [](const bench::Point&) {};
  std::function<void(const bench::Point&)> on_run = [](const bench::Point&) {};
  std::function<void(const bench::Point&)> on_record = [](const bench::Point&) {};
  uint64_t leak_bytes = 0;  // stays behind after each load
  int loads = 0, runs = 0, rates_measured = 0;
  double noise = 0;

  Load load(const bench::Point& point) override {
    if (loaded_ && point_.overrides == point.overrides) {
      point_ = point;
      return {this, 1, true, false, std::nullopt};
    }
    unload();
    const uint64_t in_use = in_use_;
    on_load(point);
    ++loads;
    in_use_ += leak_bytes;
    point_ = point;
    loaded_ = true;
    facts_.architecture = "Pretended";
    facts_.device = "cpu";
    facts_.dtype = "bf16";
    facts_.layers = facts_.threads = 1;
    facts_.context = 100;
    facts_.memory = {{"experts", 10, 20}};
    return {this, 1, false, false, in_use};
  }
  void unload() override { loaded_ = false; }
  std::optional<uint64_t> in_use_bytes() override { return in_use_; }
  bench::MachineFacts machine() override { return {"cpu", {}, {}, "pretended", 2, 1 << 30}; }
  bench::Rates measure_rates(const bench::Rates& given) override {
    ++rates_measured;
    bench::Rates rates = given;
    if (!rates.device_read) rates.device_read = 100;
    return rates;
  }

 private:
  bench::PointFacts facts(const bench::Workload&) const override { return facts_; }
  bench::RequestSample run(const bench::Workload& workload, int) override {
    on_run(point_);
    ++runs;
    bench::RequestSample sample;
    const double step = step_s(point_);
    sample.prefill.wall_s = step * 2;
    sample.first_token_s = {step * 2};
    for (int64_t i = 1; i < workload.generated_tokens; ++i) {
      sample.step_s.push_back(step * (1 + noise * std::uniform_real_distribution<>(-1, 1)(engine_)));
      sample.decode.wall_s += sample.step_s.back();
    }
    return sample;
  }
  bench::MemoryPeaks memory() const override { return {1000, std::nullopt, 2000, 3000}; }
  bench::Timeline record_step() override {
    on_record(point_);
    return {"imagination", {{"CPU", "thinking", 0, 1}}, std::nullopt};
  }

  std::mt19937 engine_{std::random_device{}()};
  bench::Point point_;
  bench::PointFacts facts_;
  bool loaded_ = false;
  uint64_t in_use_ = 5000;
};

}  // namespace lighter::test
