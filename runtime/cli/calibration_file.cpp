#include "runtime/cli/calibration_file.h"

#include <algorithm>
#include <cstdlib>

#include "runtime/device/device.h"
#include "runtime/error.h"

namespace lighter::cli {
namespace {

constexpr const char* kRunIt = "run lighter calibrate with this configuration";

// Empty where the environment names none.
std::filesystem::path cache_folder() {
  const auto set = [](const char* name) {
    const char* value = std::getenv(name);
    return std::filesystem::path(value == nullptr ? "" : value);
  };
  if (const auto cache = set("XDG_CACHE_HOME"); !cache.empty()) return cache;
  const auto home = set("HOME");
  return home.empty() ? home : home / ".cache";
}

std::filesystem::path path_below(const std::filesystem::path& cache, const std::string& device_name) {
  std::string name = "calibration-" + device_name + ".json";
  std::ranges::replace_if(
      name, [](unsigned char c) { return !std::isalnum(c) && c != '-' && c != '.'; }, '-');
  return cache / "lighter" / name;
}

// Empty where there is no such GPU, or no CUDA in this build: one may plan for another machine.
std::string device_name(const DeviceConfig& device) {
  if (device.kind == DeviceConfig::Kind::cpu) return make_cpu_device(0, 0)->name();
  try {
    return make_cuda_device(device.index, 0, 0)->name();
  } catch (const ConfigError&) {
    return "";
  } catch (const DeviceError&) {
    return "";
  }
}

}  // namespace

std::filesystem::path calibration_path(const std::string& device_name) {
  const auto cache = cache_folder();
  if (cache.empty()) throw ConfigError("neither XDG_CACHE_HOME nor HOME is set; name a file with --out");
  return path_below(cache, device_name);
}

UsableCalibration usable_calibration(const Config& config, int threads, const std::filesystem::path& file) {
  const bool cuda = config.device.kind == DeviceConfig::Kind::cuda;
  if (!file.empty()) {
    const auto given = offload::read_calibration(file);
    if (!given)
      throw ConfigError(file.string() + ": is of another version; make it anew with lighter calibrate");
    if (given->cuda != cuda) {
      throw ConfigError(file.string() + ": is of " + given->device + ", but device is " +
                        (cuda ? "cuda" : "cpu"));
    }
    return {*given, ""};
  }
  const offload::Calibration documented = offload::default_calibration(cuda);
  const std::string device = device_name(config.device);
  if (device.empty()) return {documented, "there is no such GPU here"};
  const auto cache = cache_folder();
  const auto kept = path_below(cache, device);
  if (cache.empty() || !std::filesystem::exists(kept)) return {documented, kRunIt};
  const auto read = offload::read_calibration(kept);
  if (!read) return {documented, kept.string() + " is not used: it is of another version; " + kRunIt};
  const std::string why = why_other_machine(*read, {device, offload::cpu_name(), threads});
  if (why.empty()) return {*read, ""};
  return {documented, kept.string() + " is not used: " + why + "; " + kRunIt};
}

}  // namespace lighter::cli
