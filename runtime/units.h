// Text for times in messages.
#pragma once

#include <string>

namespace lighter {

// "1.2 s", "3 min 20 s".
std::string format_seconds(double seconds);

}  // namespace lighter
