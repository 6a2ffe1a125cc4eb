// SlicePager::load: every expert is read once, straight into its home; slices without a home go through a
// staging buffer to the device. A store that was kept filled is only copied from.
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <atomic>

#include "offload/slice_pager.h"

namespace lighter::offload {
namespace {

constexpr uint64_t kMaxStagingBytes = uint64_t{1} << 30;

int loaders(const ExpertGrid& grid, const PagerOptions& options, int homeless) {
  if (homeless == 0) return options.load_threads;
  const uint64_t each = grid.slice_bytes * static_cast<uint64_t>(homeless);
  return static_cast<int>(std::clamp<uint64_t>(kMaxStagingBytes / each, 1, options.load_threads));
}

// Belongs to one loop below, not to one thread: while a source makes an expert in parallel, the thread that
// waits for it may begin another loop.
struct Worker {
  Buffer staging;
  std::unique_ptr<Stream> stream;
};

}  // namespace

uint64_t load_staging_bytes(const ExpertGrid& grid, const PagerOptions& options) {
  const int homeless = initial_residency(grid, options).most_homeless_of_an_expert;
  return grid.slice_bytes * static_cast<uint64_t>(homeless) * loaders(grid, options, homeless);
}

void SlicePager::load(const SliceSource& source, const Progress& progress) {
  std::vector<int> slot_of(grid_.total_slices(), -1);
  for (const auto& layer : initial_.layers) {
    for (const SliceId slice : layer) {
      slot_of[grid_.index(slice)] = cache_.place(slice, initial_.pinned[grid_.index(slice)]);
    }
  }
  const int homeless = own_store_ ? initial_.most_homeless_of_an_expert : 0;
  std::vector<Worker> workers(loaders(grid_, options_, homeless));
  tbb::task_arena arena(static_cast<int>(workers.size()));
  std::mutex progress_mutex;
  uint64_t done = 0;

  const auto load_expert = [&](ExpertId id, Worker& worker) {
    if (worker.stream == nullptr) {
      worker = {device_.allocate_host(grid_.slice_bytes * homeless, "staging for loading"),
                device_.new_copy_stream()};
    }
    std::vector<std::byte*> targets;
    std::byte* next_staging = worker.staging.data();
    for (int i = 0; i < grid_.slices; ++i) {
      std::byte* home = store_->address({id.layer, id.expert, i});
      if (home == nullptr) {
        home = next_staging;
        next_staging += grid_.slice_bytes;
      }
      targets.push_back(home);
    }
    if (!store_->filled()) source.read_expert(id, targets);
    for (int i = 0; i < grid_.slices; ++i) {
      const int slot = slot_of[grid_.index({id.layer, id.expert, i})];
      if (slot >= 0) worker.stream->copy(cache_.slot_address(slot), targets[i], grid_.slice_bytes);
    }
    worker.stream->synchronize();
    std::lock_guard lock(progress_mutex);
    done += grid_.expert_bytes();
    progress("loading experts", done, grid_.total_bytes());
  };

  if (!store_->filled()) store_->allocate(progress);
  for (int layer = 0; layer < grid_.layers; ++layer) {
    std::atomic<int> next_expert = 0;
    arena.execute([&] {
      tbb::parallel_for(
          size_t{0}, workers.size(),
          [&](size_t worker) {
            for (int expert; (expert = next_expert++) < grid_.experts;)
              load_expert({layer, expert}, workers[worker]);
          },
          tbb::simple_partitioner());
    });
  }
  store_->set_filled();
  std::lock_guard lock(mutex_);
  cache_.end_step();
}

}  // namespace lighter::offload
