// results.json on disk: written beside the file and renamed, so that there is never half of one.
#pragma once

#include <array>
#include <filesystem>

#include "bench/result.h"

namespace lighter::bench {

// Throws ConfigError for a file that cannot be read, is no JSON, or is no results file of this version.
Json read_results(const std::filesystem::path& file);

// What a measured point was measured with, beside its key; every results file has these among its facts.
inline constexpr std::array kComparedFacts = {"architecture", "synthetic", "layers",  "device", "dtype",   "experts",
                                              "routing",      "prompts",   "context", "decode", "threads", "resident_share"};

// As it stands in the file: indented, but with what is short, and lists of numbers, on one line.
std::string results_text(const Json& results);

// Throws ConfigError when it cannot be written.
void write_atomically(const std::filesystem::path& file, const std::string& text);

}  // namespace lighter::bench
