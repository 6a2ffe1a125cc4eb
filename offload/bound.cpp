#include "offload/bound.h"

#include <algorithm>
#include <cmath>

namespace lighter::offload {
namespace {

constexpr double kGb = 1e9;

std::optional<double> rate_of(MissWay way, const Rates& rates) {
  switch (way) {
    case MissWay::link:
      return rates.link;
    case MissWay::cpu:
      return rates.cpu_read;
    case MissWay::both:
      return rates.both;
  }
  return std::nullopt;
}

}  // namespace

const char* miss_way_name(MissWay way) {
  switch (way) {
    case MissWay::link:
      return "link";
    case MissWay::cpu:
      return "cpu";
    case MissWay::both:
      return "both";
  }
  return "?";
}

double distinct_experts(int experts, int experts_per_token, int batch) {
  if (experts == 0) return 0;
  const double share = static_cast<double>(experts_per_token) / experts;
  return experts * (1 - std::pow(1 - share, batch));
}

double routed_bytes(const StepBytes& bytes, int batch) {
  return bytes.moe_layers * distinct_experts(bytes.experts, bytes.experts_per_token, batch) *
         static_cast<double>(bytes.expert);
}

std::optional<double> step_bound_s(const StepBytes& bytes, double resident_share, MissWay way,
                                   const Rates& rates, int batch, double context) {
  if (!rates.device_read) return std::nullopt;
  const double device = *rates.device_read * kGb;
  const double routed = routed_bytes(bytes, batch);
  const double missed = (1 - resident_share) * routed;
  const double kv = static_cast<double>(bytes.kv_per_token) * context * batch;
  const double outside = (static_cast<double>(bytes.fixed - bytes.shared) + kv) / device;
  const double inside = (static_cast<double>(bytes.shared) + resident_share * routed) / device;
  if (missed <= 0) return outside + inside;
  const std::optional<double> rate = rate_of(way, rates);
  if (!rate) return std::nullopt;
  return outside + std::max(missed / (*rate * kGb), inside);
}

}  // namespace lighter::offload
