// Results as one HTML file that needs nothing else: the template, the plotting library and the data together.
// Pure; thread-safe.
#pragma once

#include <string>

#include "bench/result.h"

namespace lighter::bench {

std::string results_html(const Json& results);

}  // namespace lighter::bench
