// Sizes in bytes as people write them. Pure functions; thread-safe.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace lighter {

// "78GiB", "22.5 GB": a number with up to six decimals and one of B, KB, KiB, MB, MiB, GB, GiB, TB, TiB.
// A part of a byte is dropped, so that a budget is never more than what was written.
// Nothing for other text and for 1 EiB and above.
std::optional<uint64_t> parse_bytes(std::string_view text);

// The largest binary unit that gives at least 1, with two decimals: "77.95 GiB"; below 1 KiB "512 B".
std::string format_bytes(uint64_t bytes);

}  // namespace lighter
