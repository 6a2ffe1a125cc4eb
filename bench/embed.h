// Files that are part of the program: the report's template and the plotting library. Constants.
#pragma once

#include <string_view>

namespace lighter::bench {

std::string_view report_template();
std::string_view chart_library();

}  // namespace lighter::bench
