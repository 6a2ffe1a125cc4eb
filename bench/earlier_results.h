// What an earlier run has left where results are to be written: gone on with, replaced, or refused, so that
// hours of measuring are not lost to a forgotten --resume or a mistaken --out.
#pragma once

#include <filesystem>

#include "bench/result.h"

namespace lighter::bench {

// The results to go on with; null: none. Throws ConfigError
//   without resume, for a file that is no results file, and for a sweep that was not finished;
//   with resume, for results of another machine, and for those that share no point with the sweep.
Json earlier_results(const std::filesystem::path& file, bool resume, const Sweep& sweep,
                     const MachineFacts& machine);

}  // namespace lighter::bench
