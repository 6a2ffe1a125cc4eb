// How long work tells where it is, and learns that it should stop.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace lighter {

// Called now and then, by any one thread at a time, with bytes done and bytes in all. May throw Interrupted.
using Progress = std::function<void(const std::string& what, uint64_t done, uint64_t total)>;

// Nobody wants to know.
inline const Progress kNoProgress = [](const std::string&, uint64_t, uint64_t) {};

}  // namespace lighter
