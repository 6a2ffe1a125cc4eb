// Finds stop strings in streamed text, holding back what may become one.
#pragma once

#include <string>
#include <vector>

namespace lighter {

class StopMatcher {
 public:
  explicit StopMatcher(std::vector<std::string> stops) : stops_(std::move(stops)) {}

  // Returns the text that can be shown now. After a stop string was found, stopped() is true, and the text
  // ends before it.
  std::string push(const std::string& text);
  // What was held back, when no more text comes.
  std::string flush();
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace lighter
