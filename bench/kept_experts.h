// The experts in host memory that points of the same weights share, so that only the first of them reads or
// makes them. At most one store at a time. It is kept while a later point of the sweep needs it and while it
// and what is loaded beside it stay within the host budget that it was made under; a point whose own budget
// cannot hold all experts gets a store of its own, as in a plain run. Not thread-safe.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "bench/sweep.h"
#include "offload/expert_store.h"
#include "runtime/cli/prepared_model.h"

namespace lighter::bench {

class KeptExperts {
 public:
  // sweep must outlive it.
  explicit KeptExperts(const Sweep& sweep);

  // For a point that is about to be loaded while nothing is; null: it gets a store of its own. Frees what has
  // to go for it.
  std::shared_ptr<offload::ExpertStore> store_for(const Point& point, const Config& config,
                                                  const cli::PreparedModel& model);
  // After a load that failed: a store that it left half full is of no use.
  void drop_unfilled();
  // Held by the store, if it is filled.
  uint64_t bytes() const;

 private:
  bool needed_after(size_t place, const std::string& weights, const Point& point) const;
  void drop();

  const Sweep& sweep_;
  std::vector<std::string> weights_;  // by point: what the experts' bytes depend on
  size_t furthest_ = 0;               // point loaded so far
  std::string kept_weights_;
  uint64_t budget_bytes_ = 0;  // under which the store was made
  std::unique_ptr<Device> device_;
  std::shared_ptr<offload::ExpertStore> store_;
};

}  // namespace lighter::bench
