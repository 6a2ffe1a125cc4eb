// What repeats are boiled down to. Pure functions; values need not be sorted and must not be empty.
#pragma once

#include <cstddef>
#include <vector>

namespace lighter::bench {

struct Summary {
  double median = 0;
  double min = 0;
  double max = 0;
  size_t count = 0;

  // What the repeats disagree by, as a share of their median; 0 for a single one.
  double spread() const { return median > 0 ? (max - min) / median : 0; }
};

Summary summarize(const std::vector<double>& values);

// share in [0, 1]; between two values, linear.
double percentile(std::vector<double> values, double share);

}  // namespace lighter::bench
