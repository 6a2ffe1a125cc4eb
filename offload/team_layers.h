// What the workers of a CpuTeam share of a layer, and where it lies while any of them is at it.
//
// Layers are numbered 1, 2, … and come in this order; a layer's place is given to a later one when it is
// complete and no worker holds it. So a worker that has lost its core in the midst of a layer finds on its
// return what it left, while the others are layers further.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <vector>

#include "offload/work_claims.h"
#include "runtime/quant/activations.h"

namespace lighter::offload {

struct TeamLayer {
  // The hidden values of a job, [uses, columns].
  struct alignas(64) Hidden {
    std::atomic<int64_t> computed = 0;  // columns
    std::atomic<uint64_t> layer = 0;    // whose they are, once quantized
    QuantizedActivations quantized;
  };
  struct Claims {
    WorkClaims gate_up;
    WorkClaims down;
  };

  std::atomic<uint64_t> number = 0;  // of the layer whose place this is
  std::atomic<bool> complete = true;
  alignas(64) std::atomic<int64_t> rows_done = 0;  // of the output
  std::vector<float> values;                       // hidden, of all jobs
  std::deque<Hidden> hidden;                       // by job
  Claims known;     // of jobs that became known when the layer was posted
  Claims expected;  // of jobs that were expected before
};

class TeamLayers {
 public:
  // A worker holds two at most; besides, there are those under way, and the next one.
  explicit TeamLayers(int workers) : places_(static_cast<size_t>(2 * workers + 4)), holders_(workers) {}

  // While no worker is at any: the numbers begin anew. Room for lists of up to so many hidden values; of one
  // layer, after which comes none, or of any number.
  void reset(int64_t hidden_values, bool one);
  int64_t hidden_values() const { return hidden_values_; }

  // Worker `holder` holds the layer until it releases it, or wants to hold the one after the next. null: it
  // is over, or has no place yet.
  TeamLayer* hold(int holder, uint64_t number);
  void release(int holder, uint64_t number);
  // Complete, or long ago. Sequentially consistent with complete().
  bool over(uint64_t number) const;

  // By the worker that completed it. Makes room for the one after the next.
  void complete(TeamLayer& layer);

 private:
  struct alignas(64) Holder {
    std::atomic<TeamLayer*> held[2] = {};  // of even and of odd numbers
  };
  static constexpr uint64_t kAhead = 2;   // layers that have places: that under way, and the next
  static constexpr uint64_t kRecent = 4;  // whose places can be looked up
  static constexpr int kPlaceBits = 16;
  static constexpr uint64_t kNobody = ~0ull;

  std::atomic<uint64_t>& recent(uint64_t number) { return recent_[number % kRecent]; }
  const std::atomic<uint64_t>& recent(uint64_t number) const { return recent_[number % kRecent]; }
  void make_place(uint64_t number);
  bool is_held(const TeamLayer& layer) const;

  std::deque<TeamLayer> places_;
  std::deque<Holder> holders_;
  std::atomic<uint64_t> recent_[kRecent] = {};  // numbers, and below them the places' own
  int64_t hidden_values_ = 0;
  bool one_ = false;
};

}  // namespace lighter::offload
