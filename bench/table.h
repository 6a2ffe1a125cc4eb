// Results as text: the CSV with a row a point, the Markdown table for a README, and remarks. Pure;
// thread-safe.
#pragma once

#include <string>
#include <vector>

#include "bench/result.h"

namespace lighter::bench {

std::string results_csv(const Json& results);
// The baseline's rounds are one row, that of the round in the middle by its speed.
std::string results_markdown(const Json& results);
// What a reader of the figures has to know, a sentence each: a baseline that failed or drifted, memory that
// was left behind.
std::vector<std::string> results_remarks(const Json& results);

}  // namespace lighter::bench
