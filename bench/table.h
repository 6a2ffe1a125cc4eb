// Results as text: the CSV with a row a point, and the Markdown table for a README. Pure; thread-safe.
#pragma once

#include <string>

#include "bench/result.h"

namespace lighter::bench {

std::string results_csv(const Json& results);
// The baseline's rounds are one row.
std::string results_markdown(const Json& results);

}  // namespace lighter::bench
