#include "runtime/bytes.h"

#include <array>
#include <charconv>
#include <cstdio>

namespace lighter {
namespace {

struct Unit {
  std::string_view name;
  uint64_t bytes;
};

constexpr std::array<Unit, 9> kUnits{{{"B", 1},
                                      {"KB", 1'000},
                                      {"KiB", 1ull << 10},
                                      {"MB", 1'000'000},
                                      {"MiB", 1ull << 20},
                                      {"GB", 1'000'000'000},
                                      {"GiB", 1ull << 30},
                                      {"TB", 1'000'000'000'000},
                                      {"TiB", 1ull << 40}}};

constexpr uint64_t kLimit = 1ull << 60;
constexpr uint64_t kMillion = 1'000'000;

std::optional<uint64_t> parse_digits(std::string_view text) {
  uint64_t value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

}  // namespace

std::optional<uint64_t> parse_bytes(std::string_view text) {
  const size_t number_end = text.find_first_not_of("0123456789.");
  if (number_end == text.npos) return std::nullopt;
  const std::string_view number = text.substr(0, number_end);
  std::string_view name = text.substr(number_end);
  if (name.front() == ' ') name.remove_prefix(1);
  const Unit* unit = nullptr;
  for (const Unit& candidate : kUnits) {
    if (candidate.name == name) unit = &candidate;
  }
  if (!unit) return std::nullopt;

  const size_t dot = number.find('.');
  const auto whole = parse_digits(number.substr(0, dot));
  if (!whole || *whole >= kLimit / unit->bytes) return std::nullopt;
  uint64_t millionths = 0;
  if (dot != number.npos) {
    std::string decimals(number.substr(dot + 1));
    if (decimals.empty() || decimals.size() > 6) return std::nullopt;
    decimals.resize(6, '0');
    const auto parsed = parse_digits(decimals);
    if (!parsed) return std::nullopt;
    millionths = *parsed;
  }
  // Below 2^60: no product overflows, since millionths < 10^6 < 2^20 and a unit is at most 2^40.
  return *whole * unit->bytes + millionths * unit->bytes / kMillion;
}

std::string format_bytes(uint64_t bytes) {
  if (bytes < 1024) return std::to_string(bytes) + " B";
  constexpr std::array<const char*, 6> kNames{"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  double value = static_cast<double>(bytes) / 1024;
  size_t unit = 0;
  for (; value >= 1024 && unit + 1 < kNames.size(); ++unit) value /= 1024;
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.2f %s", value, kNames[unit]);
  return text.data();
}

}  // namespace lighter
