// Where this machine's calibration is kept, and which figures a prediction uses.
#pragma once

#include <filesystem>
#include <string>

#include "offload/calibration.h"
#include "runtime/config/config.h"

namespace lighter::cli {

// ${XDG_CACHE_HOME:-~/.cache}/lighter/calibration-DEVICE.json. Throws ConfigError where neither is set.
std::filesystem::path calibration_path(const std::string& device_name);

struct UsableCalibration {
  offload::Calibration calibration;
  std::string note;  // why it is no measurement of this machine, and what to do; empty: it is
};

// file: where given, that one is used for whatever machine it is of. Else the one kept for this machine if it
// fits, and else documented figures. threads: of the CPU's experts. Throws ConfigError for a damaged file,
// and for a given one that cannot be used.
UsableCalibration usable_calibration(const Config& config, int threads,
                                     const std::filesystem::path& file = {});

}  // namespace lighter::cli
