#include "runtime/engine/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace lighter {

std::string StopMatcher::push(const std::string& text) {
  if (stopped_) return {};
  held_ += text;
  size_t first = std::string::npos;
  size_t begins = held_.size();  // where a stop string may have begun
  for (const std::string& stop : stops_) {
    if (stop.empty()) continue;  // It would be found everywhere.
    first = std::min(first, held_.find(stop));
    for (size_t at = held_.size() > stop.size() ? held_.size() - stop.size() : 0; at < held_.size(); ++at) {
      if (stop.compare(0, held_.size() - at, held_, at) == 0) {
        begins = std::min(begins, at);
        break;
      }
    }
  }
  if (first != std::string::npos) {
    stopped_ = true;
    return std::exchange(held_, {}).substr(0, first);
  }
  const std::string shown = held_.substr(0, begins);
  held_.erase(0, begins);
  return shown;
}

std::string StopMatcher::flush() {
  return std::exchange(held_, {});
}

}  // namespace lighter
