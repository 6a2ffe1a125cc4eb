#include "runtime/config/selector.h"

#include <algorithm>
#include <charconv>

namespace lighter {
namespace {

constexpr int kMaxIndex = 9999;

std::optional<int> parse_index(std::string_view text) {
  int value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || text.front() == '-' || value > kMaxIndex) {
    return std::nullopt;
  }
  return value;
}

std::optional<IndexSet::Range> parse_range(std::string_view text) {
  const size_t dash = text.find('-');
  const auto first = parse_index(text.substr(0, dash));
  const auto last = dash == text.npos ? first : parse_index(text.substr(dash + 1));
  if (!first || !last || *first > *last) return std::nullopt;
  return IndexSet::Range{*first, *last};
}

}  // namespace

bool IndexSet::contains(int index) const {
  return all ||
         std::ranges::any_of(ranges, [&](const Range& r) { return r.first <= index && index <= r.last; });
}

bool IndexSet::overlaps(const IndexSet& other) const {
  if (all || other.all) return true;
  return std::ranges::any_of(ranges, [&](const Range& a) {
    return std::ranges::any_of(other.ranges,
                               [&](const Range& b) { return a.first <= b.last && b.first <= a.last; });
  });
}

int IndexSet::max_index() const {
  int largest = -1;
  for (const Range& range : ranges) largest = std::max(largest, range.last);
  return largest;
}

std::optional<IndexSet> parse_index_set(std::string_view text) {
  IndexSet set;
  if (text == "*") {
    set.all = true;
    return set;
  }
  while (true) {
    const size_t comma = text.find(',');
    const auto range = parse_range(text.substr(0, comma));
    if (!range) return std::nullopt;
    set.ranges.push_back(*range);
    if (comma == text.npos) return set;
    text.remove_prefix(comma + 1);
  }
}

std::optional<PinSelector> parse_pin(std::string_view text) {
  const size_t slash = text.find('/');
  if (slash == text.npos) return std::nullopt;
  const auto layers = parse_index_set(text.substr(0, slash));
  const auto experts = parse_index_set(text.substr(slash + 1));
  if (!layers || !experts) return std::nullopt;
  return PinSelector{*layers, *experts};
}

}  // namespace lighter
