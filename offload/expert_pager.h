// Offloading behind the seam: the experts that are not on the device are brought there when a layer needs
// them, or ahead of it. See SlicePager for how.
#pragma once

#include <memory>
#include <optional>

#include "offload/batch_share.h"
#include "offload/slice_pager.h"
#include "runtime/moe/expert_executor.h"
#include "runtime/moe/routed_sum.h"
#include "runtime/moe/slice_format.h"

namespace lighter::offload {

class ExpertPager : public ExpertExecutor {
 public:
  // hint_depth: layers ahead for which the model should guess its routing; 0 switches prefetch off.
  // share: how the CPU takes part in steps of several tokens; none: it does not. kept: see SlicePager.
  ExpertPager(Device& device, const ExpertGrid& grid, std::unique_ptr<SliceFormat> format,
              const PagerOptions& options, int hint_depth, const std::optional<BatchShareOptions>& share = {},
              std::shared_ptr<ExpertStore> kept = nullptr);

  void load(const SliceSource& source, const Progress& progress) { pager_.load(source, progress); }

  void prepare(const StepLimits& limits, std::vector<SharedExpert> shared) override;
  void enqueue(int layer, const MoeStep& step, at::Tensor& out) override;
  void between_steps() override;
  void learn(std::span<const int> experts) override { pager_.learn(experts); }
  bool capturable() const override { return false; }  // The host reads the routing to page.
  int hint_depth() const override { return hint_depth_; }
  ExpertCounters counters() const override;
  SlicePlaces slice_places() const override;
  uint64_t places_version() const override { return 1 + pager_.residency()->version; }
  bool places_stay() const override { return pager_.places_stay(); }

  const SlicePager& pager() const { return pager_; }
  // Null: the CPU takes no part.
  const BatchShare* share() const { return share_.get(); }

 private:
  // What the host needs to know of a step's layer.
  struct Read {
    at::Tensor experts;          // [tokens · (1 + hints), k]
    at::Tensor hidden, weights;  // fp32, for the CPU's share; else undefined
  };
  Read start_reading(const MoeStep& step);

  Device& device_;
  const ExpertGrid grid_;
  std::unique_ptr<SliceFormat> format_;
  const int hint_depth_;
  HostReading reading_;
  SlicePager pager_;
  std::vector<SharedExpert> shared_;
  std::unique_ptr<BatchShare> share_;
};

}  // namespace lighter::offload
