// The time of day, for files that say when they were made.
#pragma once

#include <ctime>
#include <string>

namespace lighter {

// Now, in UTC; format: strftime's. Thread-safe.
inline std::string utc_time(const char* format) {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  char text[32];
  std::strftime(text, sizeof text, format, &utc);
  return text;
}

}  // namespace lighter
