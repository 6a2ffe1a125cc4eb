#include "models/checkpoint/nearest_names.h"

#include <algorithm>
#include <compare>
#include <numeric>

namespace lighter::models {
namespace {

// Levenshtein's distance, one row at a time.
std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i + 1;
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, diagonal + 1});
    }
  }
  return row.back();
}

}  // namespace

std::vector<std::string> nearest_names(std::string_view wanted, std::span<const std::string> names,
                                       std::size_t most) {
  struct Candidate {
    bool differs_in_more_than_prefix;
    std::size_t distance;
    std::size_t index;
    auto operator<=>(const Candidate&) const = default;
  };
  // Real names have fewer than a hundred characters; longer ones are damage, not worth the time.
  constexpr std::size_t longest = 256;
  std::vector<Candidate> candidates;
  for (std::size_t i = 0; i < names.size(); ++i) {
    const std::string_view name = names[i];
    if (name.size() > longest || wanted.size() > longest) continue;
    const bool prefix_only = name.ends_with(wanted) || wanted.ends_with(name);
    candidates.push_back({!prefix_only, edit_distance(wanted, name), i});
  }
  const std::size_t kept = std::min(most, candidates.size());
  std::partial_sort(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(kept),
                    candidates.end());
  std::vector<std::string> nearest;
  for (std::size_t i = 0; i < kept; ++i) nearest.push_back(names[candidates[i].index]);
  return nearest;
}

}  // namespace lighter::models
