// All experts in device memory: the baseline that offloading is measured against, and the oracle that it is
// tested against.
#pragma once

#include <memory>

#include "runtime/device/device.h"
#include "runtime/moe/expert_executor.h"
#include "runtime/moe/routed_sum.h"
#include "runtime/moe/slice_format.h"
#include "runtime/moe/slice_source.h"
#include "runtime/progress.h"

namespace lighter {

class ResidentExperts : public ExpertExecutor {
 public:
  // Allocates grid.total_bytes() on the device. Throws CapacityError.
  ResidentExperts(Device& device, const ExpertGrid& grid, std::unique_ptr<SliceFormat> format);

  void load(const SliceSource& source, const Progress& progress);

  void prepare(const StepLimits& limits, std::vector<SharedExpert> shared) override;
  void enqueue(int layer, const MoeStep& step, at::Tensor& out) override;
  void between_steps() override {}
  bool capturable() const override { return false; }  // It groups the tokens by expert on the host.
  ExpertCounters counters() const override { return counters_; }
  SlicePlaces slice_places() const override;
  uint64_t places_version() const override { return 1; }
  bool places_stay() const override { return true; }

 private:
  Device& device_;
  const ExpertGrid grid_;
  std::unique_ptr<SliceFormat> format_;
  HostReading reading_;
  Buffer memory_;
  std::vector<SharedExpert> shared_;
  ExpertCounters counters_;
};

}  // namespace lighter
