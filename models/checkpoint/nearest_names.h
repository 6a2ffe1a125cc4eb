// "Did you mean": the names most like one that was not found. A pure function.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace lighter::models {

// At most `most` of names, best first: first those that end in `wanted` or in which `wanted` ends (one of
// them has a prefix that the other lacks), then by edit distance.
std::vector<std::string> nearest_names(std::string_view wanted, std::span<const std::string> names,
                                       std::size_t most);

}  // namespace lighter::models
