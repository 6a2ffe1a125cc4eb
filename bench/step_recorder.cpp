#include "bench/step_recorder.h"

#include <ATen/record_function.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include <algorithm>
#include <chrono>
#include <map>

namespace lighter::bench {
namespace {

namespace profiler = torch::autograd::profiler;
namespace impl = torch::profiler::impl;

constexpr size_t kMostEvents = 6000;  // of a lane; a page shows no more
constexpr double kShortestUs = 2;     // on the CPU: shorter ones only look at a tensor
constexpr size_t kLongestName = 60;
constexpr const char* kStep = "one decode step";

// A kernel's name without its namespaces and its template's arguments, which say nothing to a reader.
std::string kernel_name(const std::string& name) {
  std::string text = name.substr(0, name.find('<'));
  if (const size_t scope = text.rfind("::"); scope != text.npos) text = text.substr(scope + 2);
  text = text.substr(0, text.find('('));
  if (text.ends_with("_kernel")) text.resize(text.size() - std::string_view("_kernel").size());
  return text;
}

// The GPU's clock may be some microseconds behind.
double us_since(uint64_t zero_ns, uint64_t ns) {
  return static_cast<double>(ns - std::min(ns, zero_ns)) / 1e3;
}

// The profiler's times are unix times; what has to be added to steady ones.
int64_t unix_minus_steady_ns() {
  using namespace std::chrono;
  const auto unix_now = system_clock::now().time_since_epoch();
  const auto steady_now = steady_clock::now().time_since_epoch();
  return duration_cast<nanoseconds>(unix_now).count() - duration_cast<nanoseconds>(steady_now).count();
}

TimelineEvent timeline_event(const profiler::KinetoEvent& event, uint64_t zero_ns) {
  TimelineEvent made{"CPU", event.name(), us_since(zero_ns, event.startNs()),
                     us_since(zero_ns, event.endNs())};
  if (event.deviceType() != c10::DeviceType::CPU) {
    const bool copies = made.name.starts_with("Memcpy") && made.name.find("DtoD") == made.name.npos;
    made.lane = copies ? "PCIe" : "GPU";
    if (!copies) made.name = kernel_name(made.name);
  }
  if (made.name.size() > kLongestName) made.name = made.name.substr(0, kLongestName - 1) + "…";
  return made;
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

std::unique_ptr<profiler::ProfilerResult> profile(const std::function<bool()>& step, bool cuda) {
  const impl::ProfilerConfig config(impl::ProfilerState::KINETO);
  std::set<impl::ActivityType> activities = {impl::ActivityType::CPU};
  if (cuda) activities.insert(impl::ActivityType::CUDA);
  profiler::prepareProfiler(config, activities);
  profiler::enableProfiler(config, activities, {at::RecordScope::FUNCTION, at::RecordScope::USER_SCOPE});
  bool made = false;
  try {
    // The first step meets a profiler that is still setting itself up.
    made = step();
    if (made) {
      RECORD_USER_SCOPE(kStep);
      made = step();
    }
  } catch (...) {
    profiler::disableProfiler();
    throw;
  }
  auto result = profiler::disableProfiler();
  return made ? std::move(result) : nullptr;
}

}  // namespace

Timeline record_timeline(const std::function<bool()>& step, bool cuda, bool reads_host_memory,
                         const std::function<std::vector<MissSpan>()>& cpu_spans) {
  Timeline timeline{"libtorch's profiler", {}, {}};
  const auto result = profile(step, cuda);
  if (result == nullptr) {
    timeline.note = "the context has no room for two more tokens";
    return timeline;
  }
  const auto& recorded = result->events();
  const auto whole = std::ranges::find_if(recorded, [](const auto& event) {
    return event.deviceType() == c10::DeviceType::CPU && event.name() == kStep;
  });
  if (whole == recorded.end()) {
    timeline.note = "the profiler recorded nothing";
    return timeline;
  }
  std::vector<TimelineEvent> events;
  for (const auto& event : recorded) {
    const bool within = event.endNs() >= whole->startNs() && event.startNs() <= whole->endNs();
    const bool waits = event.name().find("Synchronize") != std::string::npos;
    if (within && !waits && event.name() != kStep && !event.isHiddenEvent()) {
      TimelineEvent made = timeline_event(event, whole->startNs());
      if (reads_host_memory && made.lane == "GPU" && (made.name == "gate_up" || made.name == "down")) {
        events.push_back({"PCIe", made.name + "'s slices from host memory", made.begin_us, made.end_us});
      }
      events.push_back(std::move(made));
    }
  }
  const int64_t to_unix = unix_minus_steady_ns();
  for (const MissSpan& span : cpu_spans()) {
    const auto begin = static_cast<uint64_t>(span.begin_ns + to_unix),
               end = static_cast<uint64_t>(span.end_ns + to_unix);
    if (end < whole->startNs() || begin > whole->endNs()) continue;
    events.push_back({"CPU", "experts of MoE layer " + std::to_string(span.layer),
                      us_since(whole->startNs(), begin), us_since(whole->startNs(), end)});
  }
  timeline.events = outermost(std::move(events));
  const bool any_gpu =
      std::ranges::any_of(timeline.events, [](const auto& event) { return event.lane != "CPU"; });
  if (cuda && !any_gpu) {
    timeline.note =
        "the profiler recorded nothing of the GPU: another profiler may be attached, or the driver lets only "
        "administrators profile";
  }
  return timeline;
}

}  // namespace lighter::bench
