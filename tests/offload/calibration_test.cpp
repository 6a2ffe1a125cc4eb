#include "offload/calibration.h"

#include <doctest/doctest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "offload/calibrate.h"
#include "runtime/error.h"

namespace lighter::offload {
namespace {

namespace fs = std::filesystem;

struct ScratchFile {
  fs::path folder = fs::temp_directory_path() / ("lighter-calibration-" + std::to_string(getpid()));
  fs::path path = folder / "below" / "calibration.json";
  ~ScratchFile() { fs::remove_all(folder); }

  nlohmann::json json() const { return nlohmann::json::parse(std::ifstream(path)); }
  void write(const std::string& text) const { std::ofstream(path) << text; }
};

std::string refusal(const fs::path& file) {
  try {
    read_calibration(file);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "";
}

TEST_CASE("a calibration is read as it was written") {
  const ScratchFile file;
  for (const bool cuda : {true, false}) {
    Calibration written = default_calibration(cuda);
    written.date = "2026-11-24";
    write_calibration(written, file.path);
    CHECK(read_calibration(file.path) == written);
  }
}

TEST_CASE("a damaged calibration is refused with the file's name and what is wrong") {
  const ScratchFile file;
  write_calibration(default_calibration(true), file.path);
  const nlohmann::json good = file.json();
  const auto says = [&](const nlohmann::json& json, const std::string& text) {
    file.write(json.dump());
    const std::string message = refusal(file.path);
    CHECK_MESSAGE(message.find(text) != std::string::npos, message);
    CHECK(message.find("calibration.json") != std::string::npos);
    CHECK(message.find("lighter calibrate") != std::string::npos);
  };
  auto bad = good;
  bad.erase("link");
  says(bad, "link is missing");
  bad = good;
  bad["link"] = 0;
  says(bad, "link must be a number above 0");
  bad = good;
  bad["kernels"]["int8"] = "fast";
  says(bad, "kernels.int8 must be a number above 0");
  bad = good;
  bad["beside_copies"]["int4"] = 3;
  says(bad, "beside_copies.int4 must be an object");
  bad = good;
  bad["graph"]["layer_us"] = -1;
  says(bad, "graph.layer_us must be a number from 0");
  bad = good;
  bad["threads"] = 0;
  says(bad, "threads must be a count");
  bad = good;
  bad["speed"] = 1;
  says(bad, "'speed' is not known");
  bad = good;
  bad.erase("version");
  says(bad, "version is missing");
  file.write("{\"version\": 1,");
  CHECK(refusal(file.path).find("not a JSON object") != std::string::npos);
  CHECK(refusal(file.folder / "nowhere.json").find("cannot be read") != std::string::npos);
}

TEST_CASE("a calibration of another version is not used, whatever it says") {
  const ScratchFile file;
  write_calibration(default_calibration(true), file.path);
  file.write(R"({"version": 999, "other": {}})");
  CHECK_FALSE(read_calibration(file.path));
}

TEST_CASE("a calibration is of one device, one CPU and one number of threads") {
  Calibration c = default_calibration(true);
  c.device = "GPU 1";
  c.cpu = "CPU 1";
  c.threads = 15;
  CHECK(why_other_machine(c, {"GPU 1", "CPU 1", 15}) == "");
  CHECK(why_other_machine(c, {"GPU 2", "CPU 1", 15}).find("GPU 2") != std::string::npos);
  CHECK(why_other_machine(c, {"GPU 1", "CPU 2", 15}).find("CPU 2") != std::string::npos);
  CHECK(why_other_machine(c, {"GPU 1", "CPU 1", 16}).find("15 threads") != std::string::npos);
}

TEST_CASE("calibrating takes half of the host budget, within limits and a quarter of the machine") {
  constexpr uint64_t gib = uint64_t{1} << 30;
  CHECK(calibration_host_bytes(true, 110 * gib, 126 * gib) == 126 * gib / 4);
  CHECK(calibration_host_bytes(true, 110 * gib, 512 * gib) == 32 * gib);
  CHECK(calibration_host_bytes(true, 20 * gib, 126 * gib) == 10 * gib);
  CHECK(calibration_host_bytes(true, 20 * gib, 12 * gib) == 4 * gib);
  CHECK(calibration_host_bytes(true, 20'330'000'001, 512 * gib) % (gib / 2) == 0);
  CHECK(calibration_host_bytes(false, 110 * gib, 126 * gib) == gib);
}

TEST_CASE("the CPU's rates are measured within the budgets, and what is given is kept") {
  const auto device = make_cpu_device(kCalibrationDeviceBytes, ceilings_host_bytes(false));
  Rates given;
  given.link = 12345;
  const Rates rates = measure_ceilings(*device, 2, given);
  CHECK(*rates.link == 12345);
  CHECK(*rates.cpu_read > 0.1);
  CHECK(*rates.device_read == *rates.cpu_read);
  CHECK_FALSE(rates.both);

  std::vector<std::string> told;
  const Calibration c =
      calibrate(*device, 2, ceilings_host_bytes(false),
                [&](const std::string& what, uint64_t, uint64_t) { told.push_back(what); });
  CHECK(told == std::vector<std::string>{"preparing host memory", "host memory", "copies to the device",
                                         "the CPU's experts"});
  CHECK(c.measured());
  CHECK(c.device == device->name());
  CHECK(*c.cpu_experts[SliceEncoding::int8] > 0.01);
  CHECK(*c.cpu_experts_of_4[SliceEncoding::int8] > 0.01);
  CHECK(c.kernels[SliceEncoding::int4] == *c.cpu_experts[SliceEncoding::int4]);
  CHECK_FALSE(c.zero_copy);
  CHECK(device->host_budget().used_bytes() == 0);
}

}  // namespace
}  // namespace lighter::offload
