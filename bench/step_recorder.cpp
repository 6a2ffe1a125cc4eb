#include "bench/step_recorder.h"

#include <torch/csrc/autograd/profiler_kineto.h>

#include <algorithm>
#include <map>

namespace lighter::bench {
namespace {

namespace profiler = torch::autograd::profiler;
namespace impl = torch::profiler::impl;

constexpr size_t kMostEvents = 6000;  // of a lane; a page shows no more
constexpr double kShortestUs = 2;     // on the CPU: shorter ones only look at a tensor

std::string lane_of(const profiler::KinetoEvent& event) {
  if (event.deviceType() == c10::DeviceType::CPU) return "CPU";
  const std::string name = event.name();
  const bool copy = name.starts_with("Memcpy") && name.find("DtoD") == name.npos;
  return copy ? "PCIe" : "GPU";
}

// What lies within an earlier event of its lane is a part of it.
std::vector<TimelineEvent> outermost(std::vector<TimelineEvent> events) {
  std::ranges::stable_sort(events, [](const TimelineEvent& a, const TimelineEvent& b) {
    return a.begin_us < b.begin_us || (a.begin_us == b.begin_us && a.end_us > b.end_us);
  });
  std::map<std::string, double> covered_until;
  std::map<std::string, size_t> count;
  std::vector<TimelineEvent> kept;
  for (TimelineEvent& event : events) {
    auto [until, first] = covered_until.emplace(event.lane, event.end_us);
    if (!first && event.lane == "CPU" && event.end_us <= until->second) continue;
    until->second = std::max(until->second, event.end_us);
    if (event.lane == "CPU" && event.end_us - event.begin_us < kShortestUs) continue;
    if (++count[event.lane] <= kMostEvents) kept.push_back(std::move(event));
  }
  return kept;
}

// A kernel's template arguments say nothing to a reader.
std::string short_name(const std::string& name) {
  const std::string text = name.substr(0, name.find('<'));
  return text.size() <= 60 ? text : text.substr(0, 59) + "…";
}

}  // namespace

std::optional<Timeline> record_timeline(const std::function<void()>& step, bool cuda) {
  const impl::ProfilerConfig config(impl::ProfilerState::KINETO);
  std::set<impl::ActivityType> activities = {impl::ActivityType::CPU};
  if (cuda) activities.insert(impl::ActivityType::CUDA);
  profiler::prepareProfiler(config, activities);
  profiler::enableProfiler(config, activities, {at::RecordScope::FUNCTION, at::RecordScope::USER_SCOPE});
  std::unique_ptr<profiler::ProfilerResult> result;
  try {
    step();
  } catch (...) {
    profiler::disableProfiler();
    throw;
  }
  result = profiler::disableProfiler();
  if (result == nullptr || result->events().empty()) return std::nullopt;
  uint64_t zero = ~uint64_t{0};
  for (const auto& event : result->events()) zero = std::min(zero, event.startNs());
  std::vector<TimelineEvent> events;
  for (const auto& event : result->events()) {
    const auto us = [&](uint64_t ns) { return static_cast<double>(ns - zero) / 1e3; };
    events.push_back({lane_of(event), short_name(event.name()), us(event.startNs()), us(event.endNs())});
  }
  return Timeline{"libtorch's profiler", outermost(std::move(events))};
}

}  // namespace lighter::bench
