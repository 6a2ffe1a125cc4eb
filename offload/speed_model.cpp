#include "offload/speed_model.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "offload/cpu_jobs.h"
#include "runtime/error.h"

namespace lighter::offload {
namespace {

constexpr double kGb = 1e9, kUs = 1e-6, kTera = 1e12;
constexpr double kFewTokens = 16;      // that the kernels for single tokens serve
constexpr double kLinkInSteps = 0.95;  // what a graph's step gets of the link: layers begin and end
// Of a batch whose missed slices CPU and link share: an expert with more than four tokens takes the CPU so
// much longer, and a layer's tokens take so long to come to the CPU and its sums back, beside what the device
// does between; launches are enqueued while the CPU computes. Measured beside bench/results/h100.json.
constexpr double kManyTokensCost = 0.4;
constexpr double kHandoverUs = 100;
// The CPU takes part in a prompt where experts have no more than 16, which most have up to so many of each.
constexpr double kSharedTokens = 12;
constexpr SliceEncoding kFormats[] = {SliceEncoding::dense, SliceEncoding::int8, SliceEncoding::int4};

// How much longer the CPU takes for each further token of an expert.
double cpu_cost_of_a_token(SliceEncoding format, const Calibration& c) {
  const auto one = c.cpu_experts[format], four = c.cpu_experts_of_4[format];
  return one && four ? std::max(0.0, *one / *four - 1) / 3 : 0;
}

double weights_of(const SpeedShape& shape, SliceEncoding format, double bytes) {
  if (format == SliceEncoding::dense) return bytes / shape.dense_weight_bytes;
  // Values, and a scale (in int4 a minimum too) of 2 bytes for each group.
  return bytes / (format == SliceEncoding::int8 ? 1 + 2.0 / 128 : 0.5 + 4.0 / 64);
}

struct Cost {
  const SpeedShape& shape;
  const Calibration& c;

  double operator()(SliceEncoding format, double bytes, double tokens) const {
    const double weights = weights_of(shape, format, bytes);
    const double arithmetic = tokens > 1 ? 2 * weights * tokens / (c.tensor_tflops * kTera) : 0;
    if (tokens <= kFewTokens) return std::max(bytes / (c.kernels[format] * kGb), arithmetic);
    const double read = 2 * weights / (c.device_read * kGb);
    const double product = std::max(read, arithmetic);
    return format == SliceEncoding::dense ? product : product + bytes / (c.device_read * kGb) + read;
  }

  double operator()(const ByFormat<uint64_t>& bytes, double tokens) const {
    double seconds = 0;
    for (const auto format : kFormats) seconds += (*this)(format, static_cast<double>(bytes[format]), tokens);
    return seconds;
  }
};

double sum(const ByFormat<uint64_t>& bytes) {
  double total = 0;
  for (const auto format : kFormats) total += static_cast<double>(bytes[format]);
  return total;
}

double weights_of(const SpeedShape& shape, const ByFormat<uint64_t>& bytes) {
  double total = 0;
  for (const auto format : kFormats) total += weights_of(shape, format, static_cast<double>(bytes[format]));
  return total;
}

double tokens_of_an_expert(const SpeedShape& shape, int tokens) {
  if (shape.moe_layers == 0) return 0;
  return static_cast<double>(tokens) * shape.experts_per_token /
         distinct_experts(shape.experts, shape.experts_per_token, tokens);
}

// Of the experts that a batch chooses, those with more than four tokens, if their numbers are Poisson's;
// mean: of all experts.
double share_beyond_four(double mean) {
  double term = std::exp(-mean), up_to_four = 0;
  const double none = term;
  for (int i = 1; i <= 4; ++i) up_to_four += term *= mean / i;
  return std::max(0.0, 1 - up_to_four / (1 - none));
}

double fixed_seconds(const SpeedShape& shape, const FixedCosts& costs, bool misses) {
  return kUs * (costs.step + shape.layers * (costs.layer + costs.attention) +
                shape.moe_layers * (costs.moe_layer + (misses ? costs.miss_layer : 0)));
}

// The rate, in GB/s, at which each way takes its share of a token's missed bytes; nothing where it cannot be.
std::optional<SharedRate> rates_of(MissMode mode, SliceEncoding format, bool copies, const Calibration& c) {
  switch (mode) {
    case MissMode::fetch:
      return SharedRate{0, copies ? c.link : kLinkInSteps * c.link};
    case MissMode::zero_copy:
      if (!c.zero_copy) return std::nullopt;
      return SharedRate{0, *c.zero_copy};
    case MissMode::cpu:
      if (!c.cpu_experts[format]) return std::nullopt;
      return SharedRate{*c.cpu_experts[format], 0};
    case MissMode::split:
      return copies ? c.beside_copies[format] : c.beside_zero_copy[format];
  }
  return std::nullopt;
}

// The same for several tokens. Of memory, which others read too, and arithmetic the slower one counts.
std::optional<SharedRate> rates_of(MissMode mode, const SpeedShape& shape, int tokens, bool copies,
                                   const Calibration& c) {
  auto rates = rates_of(mode, shape.expert_format, copies, c);
  const auto alone = c.cpu_experts[shape.expert_format];
  if (!rates || rates->cpu == 0 || !alone) return rates;
  const double per_expert = std::max(1.0, tokens_of_an_expert(shape, tokens));
  double arithmetic = 1 + cpu_cost_of_a_token(shape.expert_format, c) * (per_expert - 1);
  if (copies) {
    const double mean = static_cast<double>(tokens) * shape.experts_per_token / shape.experts;
    arithmetic *= 1 + kManyTokensCost * share_beyond_four(mean);
  }
  rates->cpu = std::min(rates->cpu, *alone / arithmetic);
  return rates;
}

}  // namespace

const char* miss_mode_name(MissMode mode) {
  switch (mode) {
    case MissMode::fetch:
      return "fetch";
    case MissMode::zero_copy:
      return "zero_copy";
    case MissMode::cpu:
      return "cpu";
    case MissMode::split:
      return "split";
  }
  return "?";
}

MissWay way_of(MissMode mode) {
  if (mode == MissMode::cpu) return MissWay::cpu;
  return mode == MissMode::split ? MissWay::both : MissWay::link;
}

StepBytes step_bytes(const SpeedShape& shape) {
  StepBytes bytes;
  bytes.fixed = static_cast<uint64_t>(sum(shape.outside) + sum(shape.shared) + sum(shape.head));
  bytes.shared = static_cast<uint64_t>(sum(shape.shared));
  bytes.expert = shape.expert;
  bytes.moe_layers = shape.moe_layers;
  bytes.experts = shape.experts;
  bytes.experts_per_token = shape.experts_per_token;
  bytes.kv_per_token = shape.kv_per_token;
  return bytes;
}

std::optional<DecodeSpeed> decode_speed(const SpeedShape& shape, const DecodeLoad& load, const Calibration& c,
                                        MissMode mode) {
  const Cost cost{shape, c};
  const double routed = routed_bytes(step_bytes(shape), load.batch);
  const double missed = (1 - load.resident_share) * routed;
  const double per_expert = tokens_of_an_expert(shape, load.batch);

  DecodeSpeed speed;
  speed.mode = mode;
  const double kv = static_cast<double>(shape.kv_per_token) * load.context * load.batch;
  const double kv_rate = std::min(c.device_read, c.kv_read * load.batch) * kGb;
  speed.outside_s = cost(shape.outside, load.batch) + cost(shape.head, load.batch) + kv / kv_rate;
  speed.experts_s =
      cost(shape.shared, load.batch) + cost(shape.expert_format, load.resident_share * routed, per_expert);
  speed.fixed_s = fixed_seconds(shape, load.graph ? c.graph : c.eager, missed > 0);
  double head_start = 0;  // of the copies
  double launches_s = 0;  // while the CPU computes
  if (missed > 0) {
    const bool copies = !load.graph || per_expert > kFewTokens;
    const auto rates = rates_of(mode, shape, load.batch, copies, c);
    if (!rates || (mode == MissMode::zero_copy && copies)) return std::nullopt;
    if (copies && rates->cpu > 0) {
      launches_s = std::exchange(speed.fixed_s, kUs * kHandoverUs * shape.moe_layers);
      if (rates->device > 0) head_start = speed.outside_s + speed.fixed_s;
    }
    const double ahead = std::min(missed, rates->device * kGb * head_start);
    const double cpu_bytes = (missed - ahead) * rates->cpu / (rates->cpu + rates->device);
    if (rates->cpu > 0) speed.cpu_s = cpu_bytes / (rates->cpu * kGb);
    if (rates->device > 0) speed.link_s = (missed - cpu_bytes) / (rates->device * kGb);
  }
  speed.step_s = speed.outside_s +
                 std::max({speed.experts_s, speed.cpu_s, speed.link_s - head_start, launches_s}) +
                 speed.fixed_s;
  speed.tokens_per_s = load.batch / speed.step_s;
  return speed;
}

DecodeSpeed best_decode_speed(const SpeedShape& shape, const DecodeLoad& load, const Calibration& c,
                              std::span<const MissMode> modes) {
  std::optional<DecodeSpeed> best;
  for (const MissMode mode : modes) {
    const auto speed = decode_speed(shape, load, c, mode);
    if (speed && (!best || speed->tokens_per_s > best->tokens_per_s)) best = speed;
  }
  if (!best) throw ConfigError("this machine can see to missed experts in none of the ways asked for");
  return *best;
}

PrefillSpeed prefill_speed(const SpeedShape& shape, double resident_share, int64_t prompt, int64_t chunk,
                           const Calibration& c, MissMode mode) {
  const Cost cost{shape, c};
  const double tensor = c.tensor_tflops * kTera;
  PrefillSpeed speed;
  double seconds = 0, bound = 0;
  const StepBytes bytes = step_bytes(shape);
  const double weights =
      weights_of(shape, shape.outside) + weights_of(shape, shape.shared) +
      weights_of(shape, shape.expert_format, static_cast<double>(shape.expert) * shape.experts_per_token) *
          shape.moe_layers;
  for (int64_t at = 0; at < prompt; at += chunk) {
    const int tokens = static_cast<int>(std::min(chunk, prompt - at));
    const double routed = routed_bytes(bytes, tokens);
    const double per_expert = tokens_of_an_expert(shape, tokens);
    const double keys = static_cast<double>(at) + tokens / 2.0;
    const double attention = tokens * keys * shape.operations_per_key / tensor;
    const double compute = cost(shape.outside, tokens) + cost(shape.shared, tokens) +
                           cost(shape.expert_format, routed, per_expert) + attention;
    const bool misses = resident_share < 1 && routed > 0;
    double rate = c.link, most = c.link;
    if (mode != MissMode::fetch && per_expert <= kSharedTokens &&
        tokens * shape.experts_per_token <= kMostSharedChoices) {
      const auto rates = rates_of(mode, shape, tokens, true, c);
      if (rates) rate = rates->cpu + rates->device;
      most = mode == MissMode::cpu ? c.host_read : c.both_read.value_or(c.link);
    }
    const double missed = (1 - resident_share) * routed;
    const double link = missed / (rate * kGb);
    speed.compute_s += compute;
    speed.link_s += link;
    // A third of the shorter one is not hidden: the slots for streamed slices hold only a part of a layer.
    seconds += std::max({compute, link, fixed_seconds(shape, c.eager, misses)}) + std::min(compute, link) / 3;
    bound += std::max(2 * weights * tokens / tensor + attention, missed / (most * kGb));
  }
  seconds += cost(shape.head, 1);
  speed.tokens_per_s = static_cast<double>(prompt) / seconds;
  speed.bound_tokens_per_s = static_cast<double>(prompt) / bound;
  return speed;
}

}  // namespace lighter::offload
