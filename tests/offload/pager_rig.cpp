#include "tests/offload/pager_rig.h"

#include <algorithm>
#include <chrono>
#include <numeric>
#include <thread>

namespace lighter::offload {
namespace {

constexpr size_t kSlowCopyBytes = size_t{8} << 10;

class LaggingDevice : public Device {
 public:
  explicit LaggingDevice(std::unique_ptr<Device> device)
      : device_(std::move(device)), compute_(device_->new_copy_stream()) {}

  std::string name() const override { return device_->name(); }
  bool is_cuda() const override { return false; }
  Stream& compute_stream() override { return *compute_; }
  void put(int64_t* to, std::span<const int64_t> values) override { device_->put(to, values); }
  void hold_until(const std::atomic<uint32_t>& word, uint32_t value) override {
    device_->hold_until(word, value);
  }
  std::unique_ptr<Stream> new_copy_stream() override { return device_->new_copy_stream(); }
  std::unique_ptr<Event> new_event() override { return device_->new_event(); }
  double milliseconds_between(const Event& begin, const Event& end) const override {
    return device_->milliseconds_between(begin, end);
  }
  Buffer allocate(size_t bytes, const std::string& what) override { return device_->allocate(bytes, what); }
  Buffer allocate_host(size_t bytes, const std::string& what) override {
    return device_->allocate_host(bytes, what);
  }
  std::vector<Buffer> allocate_host_parts(std::span<const uint64_t> bytes, const std::string& what,
                                          bool near_last, const Progress& progress) override {
    return device_->allocate_host_parts(bytes, what, near_last, progress);
  }
  MemoryBudget& device_budget() override { return device_->device_budget(); }
  MemoryBudget& host_budget() override { return device_->host_budget(); }
  uint64_t driver_used_bytes() const override { return device_->driver_used_bytes(); }

 private:
  std::unique_ptr<Device> device_;
  std::unique_ptr<Stream> compute_;
};

std::vector<int> draw_experts(const ExpertGrid& grid, int most, std::mt19937& random) {
  std::vector<int> all(grid.experts);
  std::iota(all.begin(), all.end(), 0);
  // Low numbers are likelier, so that there is something for lru and lfu to learn.
  std::vector<int> chosen;
  const int count = std::uniform_int_distribution<int>(1, std::min(most, grid.experts))(random);
  while (static_cast<int>(chosen.size()) < count) {
    const double u = std::uniform_real_distribution<double>(0, 1)(random);
    const int expert = std::min(grid.experts - 1, static_cast<int>(u * u * grid.experts));
    if (std::find(chosen.begin(), chosen.end(), expert) == chosen.end()) chosen.push_back(expert);
  }
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

}  // namespace

std::unique_ptr<Device> make_lagging_device(uint64_t device_budget_bytes, uint64_t host_budget_bytes) {
  return std::make_unique<LaggingDevice>(make_cpu_device(device_budget_bytes, host_budget_bytes));
}

StepVisits draw_step(const ExpertGrid& grid, const Traffic& traffic, std::mt19937& random) {
  const auto chance = [&](double share) {
    return std::uniform_real_distribution<double>(0, 1)(random) < share;
  };
  StepVisits step(grid.layers);
  const bool streaming = chance(traffic.streaming);
  for (LayerVisit& visit : step) {
    visit.streaming = streaming;
    if (!streaming) {
      visit.experts = draw_experts(grid, traffic.most_experts, random);
      continue;
    }
    for (int expert = 0; expert < grid.experts; ++expert) {
      if (chance(0.9)) visit.experts.push_back(expert);
    }
  }
  for (int layer = 0; layer < grid.layers && !streaming; ++layer) {
    for (int ahead = layer + 1; ahead < std::min(grid.layers, layer + 1 + traffic.depth); ++ahead) {
      if (!chance(traffic.hints)) continue;
      step[layer].hints.emplace_back(ahead, chance(traffic.good_guess)
                                                ? step[ahead].experts
                                                : draw_experts(grid, traffic.most_experts, random));
    }
    if (!step[layer].hints.empty() && chance(traffic.pauses)) step[layer].pause_us = 100;
  }
  return step;
}

uint64_t device_bytes_for(const ExpertGrid& grid, const PagerOptions& options) {
  const uint64_t slots =
      std::accumulate(options.residents_per_layer.begin(), options.residents_per_layer.end(),
                      static_cast<uint64_t>(options.spare_slots));
  return slots * grid.slice_bytes;
}

PagerRig::PagerRig(const ExpertGrid& grid, const PagerOptions& options, bool lagging)
    : grid_(grid), options_(options), lagging_(lagging), source_(grid) {
  const InitialResidency initial = initial_residency(grid, options);
  const auto homes = std::count(initial.has_home.begin(), initial.has_home.end(), true);
  const uint64_t device_bytes = device_bytes_for(grid, options);
  const uint64_t host_bytes =
      static_cast<uint64_t>(homes) * grid.slice_bytes + load_staging_bytes(grid, options);
  device_ =
      lagging ? make_lagging_device(device_bytes, host_bytes) : make_cpu_device(device_bytes, host_bytes);
  pager_ = std::make_unique<SlicePager>(*device_, grid, options);
  pager_->load(source_, kNoProgress);
  if (lagging) {
    read_bytes_.resize(grid.total_bytes());
    slow_.resize(2 * kSlowCopyBytes);
  }
}

void PagerRig::expect(bool right, const char* what) {
  if (!right && failure_.empty()) failure_ = what;
}

void PagerRig::run(const StepVisits& step) {
  const ExpertCounters before = pager_->counters();
  version_ = pager_->residency();
  const ResidencyTable copy = *version_;
  read_.clear();
  for (int layer = 0; layer < grid_.layers; ++layer) visit(layer, step[layer]);
  ++steps_;
  device_->compute_stream().synchronize();
  for (size_t i = 0; i < read_.size(); ++i) {
    expect(source_.matches(read_[i], &read_bytes_[i * grid_.slice_bytes]),
           "a slot was overwritten before the compute stream had read it");
  }
  pager_->between_steps();
  check_counters(step, before);
  expect(pager_->consistent(), "slots are lost or in two places");
  for (size_t i = 0; i < copy.locations.size(); ++i) {
    expect(copy.locations[i].slot == version_->locations[i].slot, "a published version changed");
  }
}

void PagerRig::visit(int layer, const LayerVisit& visit) {
  for (const auto& [ahead, experts] : visit.hints) pager_->hint(ahead, experts);
  size_t seen = 0;
  int overlaps = 0;
  LayerWork work;
  work.overlap = [&] {
    ++overlaps;
    if (visit.pause_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(visit.pause_us));
  };
  const auto use = [&](SliceId slice, const std::byte* address) {
    expect(overlaps == 1, "a slice came before the work that overlaps");
    const size_t place = seen++;
    const size_t slices = grid_.slices;
    expect(place < visit.experts.size() * slices &&
               slice == SliceId{layer, visit.experts[place / slices], static_cast<int>(place % slices)},
           "a slice came out of order");
    const SliceLocation& listed = version_->at(slice);
    expect(!listed.on_device() || listed.address == address,
           "a resident slice is not where its version says");
    if (lagging_) {
      Stream& compute = device_->compute_stream();
      compute.copy(&slow_[kSlowCopyBytes], slow_.data(), kSlowCopyBytes);
      compute.copy(&read_bytes_[read_.size() * grid_.slice_bytes], address, grid_.slice_bytes);
      read_.push_back(slice);
    } else {
      expect(source_.matches(slice, address), "a visited slice has wrong contents");
    }
  };
  work.use = [&](int expert, int first, std::span<const std::byte* const> addresses) {
    for (const std::byte* address : addresses) use({layer, expert, first++}, address);
  };
  pager_->visit(layer, visit.experts, visit.streaming, work);
  expect(seen == visit.experts.size() * grid_.slices, "a slice was not visited");
  expect(overlaps == 1, "the overlapping work did not run once");
  check_layers_to_come(layer);
}

// What the current version lists for layers that are not yet executed must lie there until the step ends.
void PagerRig::check_layers_to_come(int layer) {
  if (layer + 1 >= grid_.layers || steps_ % 4 != 0) return;  // It costs more than the step.
  for (int expert = 0; expert < grid_.experts; ++expert) {
    for (int i = 0; i < grid_.slices; ++i) {
      const SliceId slice{layer + 1, expert, i};
      const SliceLocation& at = version_->at(slice);
      if (at.on_device())
        expect(source_.matches(slice, at.address), "a resident of a coming layer was overwritten");
    }
  }
}

void PagerRig::check_counters(const StepVisits& step, const ExpertCounters& before) {
  const ExpertCounters did = pager_->counters() - before;
  uint64_t used = 0;
  uint64_t resident = 0;
  bool guessed = false;
  for (int layer = 0; layer < grid_.layers; ++layer) {
    guessed |= step[layer].streaming || (options_.prefetch && !step[layer].hints.empty());
    for (const int expert : step[layer].experts) {
      for (int i = 0; i < grid_.slices; ++i, ++used) resident += version_->at({layer, expert, i}).on_device();
    }
  }
  expect(did.slices_used == used, "slices_used is wrong");
  expect(did.slices_resident == resident, "slices_resident is wrong");
  expect(did.slices_prefetched + did.slices_missed == used - resident, "prefetched and missed do not add up");
  // Every copy was for a use, or in vain.
  expect(did.bytes_moved() ==
             (did.slices_prefetched + did.slices_missed) * grid_.slice_bytes + did.prefetch_wasted_bytes,
         "the bytes moved do not add up");
  if (!guessed) {
    expect(did.slices_prefetched == 0 && did.prefetch_bytes == 0 && did.prefetch_wasted_bytes == 0,
           "something was prefetched that nobody guessed");
  }
  uint64_t arrived = 0;
  const ResidencyVersion now = pager_->residency();
  std::vector<int> residents(grid_.layers);
  for (size_t i = 0; i < now->locations.size(); ++i) {
    residents[i / grid_.slices_per_layer()] += now->locations[i].on_device();
    arrived += now->locations[i].on_device() && !version_->locations[i].on_device();
  }
  expect(did.evictions == arrived, "evictions is not the number of slices that came to stay");
  expect((arrived > 0) == (now->version != version_->version),
         "the version does not tell whether something changed");
  expect(residents == options_.residents_per_layer, "a layer has more or fewer residents than planned");
}

}  // namespace lighter::offload
