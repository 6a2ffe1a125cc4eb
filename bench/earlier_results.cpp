#include "bench/earlier_results.h"

#include <algorithm>

#include "bench/results_file.h"
#include "runtime/error.h"

namespace lighter::bench {
namespace {

constexpr char kElsewhere[] = "name another folder with --out, or remove the file";

auto measured_points(const Json& results) {
  return std::ranges::count_if(results["points"],
                               [](const Json& point) { return point["status"] == "measured"; });
}

void refuse_to_lose(const std::filesystem::path& file) {
  Json left;
  try {
    left = read_results(file);
  } catch (const ConfigError& error) {
    throw ConfigError(error.what() + std::string("; so that nothing is lost, ") + kElsewhere);
  }
  const bool finished = left["complete"] == true && left["interrupted"] == false;
  if (const auto points = measured_points(left); !finished && points > 0) {
    throw ConfigError(file.string() + ": a sweep that was not finished has left " + std::to_string(points) +
                      " measured points; go on with it with --resume, or " + kElsewhere);
  }
}

std::string described(const Json& machine) {
  const std::string gpu = machine["gpu"].is_string() ? machine["gpu"].get<std::string>() + ", " : "";
  return gpu + machine["cpu"].get<std::string>() + " with " + machine["cores"].dump() + " cores";
}

}  // namespace

Json earlier_results(const std::filesystem::path& file, bool resume, const Sweep& sweep,
                     const MachineFacts& machine) {
  if (!std::filesystem::exists(file)) return nullptr;
  if (!resume) {
    refuse_to_lose(file);
    return nullptr;
  }
  Json left = read_results(file);
  if (measured_points(left) == 0) return left;
  const Json now = new_results(sweep, machine, {})["machine"];
  for (const char* name : {"gpu", "cpu", "cores"}) {
    if (left["machine"][name] == now[name]) continue;
    throw ConfigError(file.string() + ": was measured on another machine (" + described(left["machine"]) +
                      ") than this one (" + described(now) + "); " + kElsewhere);
  }
  const bool shared = std::ranges::any_of(left["points"], [&](const Json& point) {
    return std::ranges::find(sweep.points, point["id"].get<std::string>(), &Point::id) != sweep.points.end();
  });
  if (!shared) {
    throw ConfigError(file.string() +
                      ": has none of this sweep's points; it is of another sweep, or the sweep, a "
                      "configuration or the prompts were changed since; " +
                      kElsewhere);
  }
  return left;
}

}  // namespace lighter::bench
