// The CPU's share of the slices that a decode step misses: lists, for each layer that the GPU posts, the
// missed groups of columns that the GPU leaves to it, and has CpuExperts compute them.
#pragma once

#include "offload/cpu_experts.h"
#include "runtime/moe/expert_id.h"
#include "runtime/moe/miss_workers.h"
#include "runtime/moe/weight_on.h"
#include "runtime/quant/cpu_slice.h"

namespace lighter::offload {

class CpuShare : public MissWorkers {
 public:
  // threads: 0: all cores but one. Throws ConfigError for shapes that packed slices cannot have.
  CpuShare(const ExpertGrid& grid, SliceEncoding encoding, int64_t hidden, int64_t slice_width, WeightOn weight_on,
           const CpuExpertsOptions& options);

  void start(const MissWork& work, uint32_t first_step) override;
  void stop() override { cpu_.stop_polling(); }
  bool idle() const override { return cpu_.idle(); }
  MissWorkersCounters counters() const override;
  std::vector<MissSpan> latest_spans() const override { return cpu_.latest_spans(); }
  int threads() const { return cpu_.threads(); }

 private:
  void list(const MissWork& work, int layer, const MissPost& post, CpuJobs& jobs) const;

  const ExpertGrid grid_;
  const CpuSliceKernel kernel_;
  const WeightOn weight_on_;
  CpuExperts cpu_;
};

}  // namespace lighter::offload
