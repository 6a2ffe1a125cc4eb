#include "bench/statistics.h"

#include <algorithm>
#include <cmath>

namespace lighter::bench {

double percentile(std::vector<double> values, double share) {
  std::ranges::sort(values);
  const double place = share * static_cast<double>(values.size() - 1);
  const auto below = static_cast<size_t>(std::floor(place));
  const size_t above = std::min(below + 1, values.size() - 1);
  return values[below] + (place - static_cast<double>(below)) * (values[above] - values[below]);
}

Summary summarize(const std::vector<double>& values) {
  const auto [min, max] = std::ranges::minmax(values);
  return {percentile(values, 0.5), min, max, values.size()};
}

}  // namespace lighter::bench
