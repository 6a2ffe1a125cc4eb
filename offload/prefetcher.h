// Turns guesses about coming layers into prefetches, as a oneTBB flow graph in an arena of its own:
//
//   request → [expand into slices] → [queue] → [limiter] → [copy: async_node] → [ended] ─┐
//                                                 ▲────────────── one more may go ───────┘
//
// No worker waits for a copy: the transfer engine's thread hands the end of each back through the async
// node's gateway. request() is thread-safe and never blocks.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "runtime/moe/expert_id.h"

namespace lighter::offload {

// Starts the copy of one slice. Calls `ended` once, from any thread, when it is over (also when cancelled);
// returns false, and never calls it, when nothing is to be copied. Called by oneTBB workers.
using StartPrefetch = std::function<bool(uint64_t step, SliceId, std::function<void()> ended)>;

class Prefetcher {
 public:
  Prefetcher(const ExpertGrid& grid, int max_in_flight, StartPrefetch start);
  // Waits until all that was asked for has ended.
  ~Prefetcher();

  // step: handed through, so that a guess that comes late can be told from a current one.
  void request(uint64_t step, int layer, std::vector<int> experts);
  // Returns when nothing is under way; throws what a worker threw.
  void drain();

 private:
  struct Graph;
  std::unique_ptr<Graph> graph_;
};

}  // namespace lighter::offload
