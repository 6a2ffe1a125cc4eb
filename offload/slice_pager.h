// Brings the slices that a layer needs before the device, in the order of their sum. The part of ExpertPager
// that knows no tensors.
//
// visit(), hint(), between_steps(), learn() and load() are for one thread, the step's; the prefetcher's
// threads come in by themselves. Every slice of a step is visited or left over exactly once, in ascending
// order of expert and slice.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "offload/expert_cache.h"
#include "offload/expert_store.h"
#include "offload/prefetcher.h"
#include "offload/promoter.h"
#include "offload/transfer_engine.h"
#include "runtime/device/device.h"
#include "runtime/moe/expert_counters.h"
#include "runtime/moe/slice_source.h"
#include "runtime/progress.h"

namespace lighter::offload {

struct PagerOptions {
  std::vector<int> residents_per_layer;  // slots
  int spare_slots = 1;
  PolicyKind policy = PolicyKind::lru;
  std::vector<ExpertId> pinned;  // resident for ever; they come before the others
  bool prefetch = true;
  int load_threads = 1;
  bool near_pages = false;  // for the slices that the CPU computes
};

// What the device holds at the start: pinned experts whole, then the same share of every other expert's
// slices. And which slices need a home on the host: all that are not, or may not stay, on the device.
struct InitialResidency {
  std::vector<std::vector<SliceId>> layers;
  std::vector<bool> pinned;    // by grid index
  std::vector<bool> has_home;  // by grid index
  int most_homeless_of_an_expert = 0;
};
// Throws CapacityError when the pinned experts of a layer do not fit.
InitialResidency initial_residency(const ExpertGrid& grid, const PagerOptions& options);

// Host bytes that load() needs for a moment, beside the store.
uint64_t load_staging_bytes(const ExpertGrid& grid, const PagerOptions& options);

// What a layer's visit does, in this order.
struct LayerWork {
  // Called with the absent slices that the caller sees to itself, before anything is copied: those that the
  // device's share leaves over, if there are any. Null: the device does everything.
  std::function<void(std::span<const SliceId>)> leave;
  // Work that can run while the first slices come.
  std::function<void()> overlap;
  // Some slices of an expert, one after another from `first` on (those that were left are skipped), which the
  // compute stream may read now. An expert's slices may come in several calls.
  std::function<void(int expert, int first, std::span<const std::byte* const> addresses)> use;
  // Whether an expert's slices can be among those that are left. Null: any.
  std::function<bool(int expert)> may_leave = {};
};

class SlicePager {
 public:
  // Allocates the device slots. kept: a store with a home for every slice, of a device that outlives the
  // pager; null: one of its own. What a store of its own would take is entered in the device's host budget
  // either way. Throws CapacityError.
  SlicePager(Device& device, const ExpertGrid& grid, const PagerOptions& options,
             std::shared_ptr<ExpertStore> kept = nullptr);
  ~SlicePager();

  // Fills the host store, unless it was kept filled, and the resident slots.
  void load(const SliceSource& source, const Progress& progress);

  // experts: ascending, without repeats. Queues the copies of what is missing, and calls use() in the order
  // of the sum. streaming: the batch needs nearly every expert, so no admission takes place, and the next
  // layer's absent slices are queued as soon as slots are free.
  void visit(int layer, std::span<const int> experts, bool streaming, const LayerWork& work);
  // From now on: the part of each layer's absent slices that is copied in visits with `leave`; the others are
  // left over, the same number of each expert's, its last ones. 1 until then. Call it between steps.
  void set_device_share(double share) { device_share_ = share; }
  // Whether slices that a visit needs, or the next one will, are still on their way. From any thread.
  bool copying() { return transfers_.demand_outstanding(); }
  // Whether the link had nothing left to copy when the latest streaming visit came to queue the next layer's
  // slices.
  bool ran_dry() const { return ran_dry_; }
  // The coming layer will perhaps need these experts.
  void hint(int layer, std::vector<int> experts);
  // After the step's device work has finished: publishes the new residency, collects counters, and throws
  // what a worker met.
  void between_steps();

  // In place of all this, after a step that read slices where they lay by the residency last published, and
  // chose these experts: [layers, k]. Where the policy lets the residents change, hot slices come behind such
  // steps; see promoter.h. No step waits for them.
  void learn(std::span<const int> experts);
  bool places_stay() const { return options_.policy == PolicyKind::static_; }  // in spite of learn()
  // Slices that learn() has on their way.
  size_t promoting() const { return promoter_.under_way(); }

  ExpertCounters counters() const { return counters_; }
  ResidencyVersion residency() const { return cache_.residency(); }
  const ExpertStore& store() const { return *store_; }
  bool consistent() const;

 private:
  struct SlotEvents {
    std::unique_ptr<Event> ready;
    std::unique_ptr<Event> own_use;
    const Event* last_use = nullptr;
    std::shared_ptr<PrefetchCopy> prefetch;
  };
  struct Promotion {
    std::shared_ptr<PrefetchCopy> copy;
    std::shared_ptr<std::atomic<bool>> ended;
  };
  struct Stall {
    std::unique_ptr<Event> begin;
    std::unique_ptr<Event> end;
  };

  std::vector<bool> left_over(int layer) const;
  void wait_until_ready(std::span<const SliceNeed> needs);
  void release(std::span<const SliceNeed> needs);
  CopyRequest copy_into(int slot, SliceId slice);
  bool fetch(SliceNeed& need, bool admit);
  void make_room_for(SliceNeed& need, std::span<SliceNeed> later);
  void cancel_prefetch(int slot);
  void stream_ahead(int layer, bool leaving);
  bool start_prefetch(uint64_t step, SliceId slice, std::function<void()> ended);
  void count_copies();
  void end_step();
  void promote(std::span<const int> experts);
  void drop_promotions();

  Device& device_;
  const ExpertGrid grid_;
  const PagerOptions options_;
  const InitialResidency initial_;
  const std::shared_ptr<ExpertStore> store_;
  const bool own_store_;
  const uint64_t kept_bytes_;  // entered in the host budget for a store that is not its own
  Buffer slots_memory_;

  mutable std::mutex mutex_;  // guards cache_, events_[i].prefetch, step_, layer_, and what is promoted
  ExpertCache cache_;
  std::vector<SlotEvents> slot_events_;
  std::vector<std::unique_ptr<Event>> layer_use_;
  uint64_t step_ = 0;
  int layer_ = -1;
  double device_share_ = 1;
  bool ran_dry_ = false;
  Promoter promoter_;
  std::map<SliceId, Promotion> promotions_;

  std::vector<Stall> stalls_;
  size_t stalls_used_ = 0;
  ExpertCounters counters_;

  TransferEngine transfers_;
  std::unique_ptr<Prefetcher> prefetcher_;  // last: ends first
};

}  // namespace lighter::offload
