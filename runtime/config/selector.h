// Selectors such as "0-3/*" and "7/2,5": which experts of which layers. Pure values; thread-safe.
#pragma once

#include <optional>
#include <string_view>
#include <vector>

namespace lighter {

// A set of indices: "*", or numbers and ranges with both ends included, separated by commas.
struct IndexSet {
  struct Range {
    int first = 0, last = 0;
  };
  bool all = false;
  std::vector<Range> ranges;  // as written: unsorted, may overlap

  bool contains(int index) const;
  // "*" overlaps everything.
  bool overlaps(const IndexSet& other) const;
  // The largest index named, -1 for "*"; lets the reader check it against the model.
  int max_index() const;
};

// LAYERS/EXPERTS.
struct PinSelector {
  IndexSet layers, experts;

  bool contains(int layer, int expert) const { return layers.contains(layer) && experts.contains(expert); }
};

// Nothing for text that is no selector, for a range that runs backwards, and for indices above 9999.
std::optional<IndexSet> parse_index_set(std::string_view text);
std::optional<PinSelector> parse_pin(std::string_view text);

}  // namespace lighter
