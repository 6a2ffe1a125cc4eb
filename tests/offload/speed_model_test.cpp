#include "offload/speed_model.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <random>

#include "runtime/error.h"

namespace lighter::offload {
namespace {

constexpr double kGb = 1e9, kUs = 1e-6;
constexpr MissMode kModes[] = {MissMode::fetch, MissMode::zero_copy, MissMode::cpu, MissMode::split};
constexpr double kBits[] = {16, 8 + 16.0 / 128, 4 + 32.0 / 64};

ByFormat<uint64_t> in_format(SliceEncoding format, double weights) {
  ByFormat<uint64_t> bytes;
  bytes[format] = static_cast<uint64_t>(weights * kBits[static_cast<int>(format)] / 8);
  return bytes;
}

SpeedShape scout(SliceEncoding format) {
  SpeedShape shape;
  shape.layers = shape.moe_layers = 48;
  shape.outside = in_format(format, 48.0 * 5120 * 128 * (2 * 40 + 2 * 8));
  shape.shared = in_format(format, 48.0 * 3 * 5120 * 8192);
  shape.head = in_format(format, 202048.0 * 5120);
  shape.expert_format = format;
  shape.expert = in_format(format, 3.0 * 5120 * 8192)[format];
  shape.experts = 16;
  shape.experts_per_token = 1;
  shape.kv_per_token = 48 * 2 * 8 * 128 * 2;
  shape.operations_per_key = 4.0 * 40 * 128 * 48;
  return shape;
}

SpeedShape llama_8b() {
  SpeedShape shape;
  shape.layers = 32;
  shape.outside = in_format(SliceEncoding::dense, 32.0 * 4096 * (128 * (2 * 32 + 2 * 8) + 3 * 14336));
  shape.head = in_format(SliceEncoding::dense, 128256.0 * 4096);
  shape.kv_per_token = 32 * 2 * 8 * 128 * 2;
  shape.operations_per_key = 4.0 * 32 * 128 * 32;
  return shape;
}

double tokens_per_s(const SpeedShape& shape, double resident, MissMode mode, double context = 256) {
  return decode_speed(shape, {resident, 1, context, true}, default_calibration(true), mode)->tokens_per_s;
}

// The rates are those of each point's own time, while both ways were busy: host memory is shared with
// strangers.
TEST_CASE(
    "the model comes within 10 % of bench/results/scout-h100, with the rates that its host memory gave") {
  const auto within = [&](const SpeedShape& shape, double resident, SharedRate rates, double measured) {
    Calibration c = default_calibration(true);
    c.beside_zero_copy.figures = {std::nullopt, rates, rates};
    const MissMode mode = resident < 1 ? MissMode::split : MissMode::fetch;
    CAPTURE(measured);
    CHECK(decode_speed(shape, {resident, 1, 64, true}, c, mode)->tokens_per_s ==
          doctest::Approx(measured).epsilon(0.1));
  };
  within(llama_8b(), 1, {}, 188.8);
  const SpeedShape int4 = scout(SliceEncoding::int4), int8 = scout(SliceEncoding::int8);
  within(int4, 0, {90, 43}, 35.29);
  within(int4, 0.25, {91, 43}, 45.59);
  within(int4, 0.5, {85, 41}, 63.40);
  within(int4, 0.75, {76, 38}, 102.4);
  within(int4, 1, {}, 250.2);
  within(int8, 0, {83, 45}, 18.92);
  within(int8, 0.25, {77, 45}, 22.70);
  within(int8, 0.5, {72, 44}, 31.67);
  within(int8, 0.728, {76, 41}, 54.51);
}

TEST_CASE(
    "the model comes within 10 % of what bench/results/h100.json has of resident models, copies and "
    "prefill") {
  const Calibration c = default_calibration(true);
  const SpeedShape int8 = scout(SliceEncoding::int8);
  const auto decoded = [&](const SpeedShape& shape, double resident) {
    return decode_speed(shape, {resident, 1, 40, true}, c, MissMode::fetch)->tokens_per_s;
  };
  CHECK(decoded(llama_8b(), 1) == doctest::Approx(188.8).epsilon(0.1));
  CHECK(decoded(scout(SliceEncoding::int4), 1) == doctest::Approx(252.0).epsilon(0.1));
  CHECK(decoded(int8, 0.728) == doctest::Approx(27.5).epsilon(0.1));
  CHECK(prefill_speed(int8, 0.69, 8192, 8192, c).tokens_per_s == doctest::Approx(12208).epsilon(0.1));
}

TEST_CASE("in a batch the copies run ahead while the CPU waits for tokens, and both end together") {
  Calibration c = default_calibration(true);
  c.beside_copies[SliceEncoding::int8] = SharedRate{80, 40};
  c.cpu_experts[SliceEncoding::int8] = 90;
  c.cpu_experts_of_4[SliceEncoding::int8] = 80;
  const SpeedShape shape = scout(SliceEncoding::int8);
  const auto speed = *decode_speed(shape, {0.5, 64, 0, false}, c, MissMode::split);
  CHECK(speed.link_s == doctest::Approx(speed.step_s));
  CHECK(speed.cpu_s == doctest::Approx(speed.step_s - speed.outside_s - speed.fixed_s));
  CHECK(speed.cpu_s > speed.experts_s);
  // Four tokens for each expert: more than four for a third of them, which makes the CPU slower than it is
  // alone.
  const double missed = 0.5 * routed_bytes(step_bytes(shape), 64);
  const double cpu_rate = (missed - speed.link_s * 40e9) / speed.cpu_s;
  CHECK(cpu_rate < 75e9);
  CHECK(cpu_rate > 55e9);
  // Where others use the memory, arithmetic costs nothing.
  c.beside_copies[SliceEncoding::int8] = SharedRate{50, 40};
  const auto slower = *decode_speed(shape, {0.5, 64, 0, false}, c, MissMode::split);
  CHECK((missed - slower.link_s * 40e9) / slower.cpu_s == doctest::Approx(50e9));
}

TEST_CASE("short prompts are faster where the CPU takes part, long ones are not") {
  const Calibration c = default_calibration(true);
  const SpeedShape shape = scout(SliceEncoding::int4);
  const auto speed = [&](int64_t prompt, MissMode mode) {
    return prefill_speed(shape, 0.5, prompt, 1024, c, mode);
  };
  const auto fetched = speed(32, MissMode::fetch), shared = speed(32, MissMode::split);
  CHECK(shared.tokens_per_s > 1.5 * fetched.tokens_per_s);
  CHECK(shared.tokens_per_s < shared.bound_tokens_per_s);
  CHECK(speed(32, MissMode::cpu).tokens_per_s > fetched.tokens_per_s);
  CHECK(speed(1024, MissMode::split).tokens_per_s == speed(1024, MissMode::fetch).tokens_per_s);
}

TEST_CASE("each further token of an expert takes the CPU a third longer of what four take longer than one") {
  Calibration c = default_calibration(true);
  c.cpu_experts[SliceEncoding::int8] = 100;
  c.cpu_experts_of_4[SliceEncoding::int8] = 50;
  SpeedShape shape = scout(SliceEncoding::int8);
  shape.experts = 1;  // all tokens have the same
  const auto cpu_s = [&](int batch) {
    return decode_speed(shape, {0, batch, 0, true}, c, MissMode::cpu)->cpu_s;
  };
  CHECK(cpu_s(4) == doctest::Approx(2 * cpu_s(1)));
  CHECK(cpu_s(10) == doctest::Approx(4 * cpu_s(1)));
  c.cpu_experts_of_4[SliceEncoding::int8] = 120;  // noise: it does not get faster
  CHECK(cpu_s(4) == doctest::Approx(cpu_s(1)));
}

// Beyond that share the device has more to do than the ways to the missed bytes, and takes longer with each.
bool misses_count(const SpeedShape& shape, double resident, MissMode mode) {
  const auto speed = *decode_speed(shape, {resident, 1, 0, true}, default_calibration(true), mode);
  return std::max(speed.cpu_s, speed.link_s) >= speed.experts_s;
}

TEST_CASE("while misses count, more resident experts never make decoding slower; longer contexts always do") {
  for (const auto format : {SliceEncoding::int8, SliceEncoding::int4}) {
    const SpeedShape shape = scout(format);
    for (const MissMode mode : kModes) {
      for (double resident = 0; resident < 0.94; resident += 0.05) {
        CAPTURE(miss_mode_name(mode));
        CAPTURE(resident);
        CHECK(tokens_per_s(shape, resident, mode, 100) > tokens_per_s(shape, resident, mode, 8000));
        CHECK(tokens_per_s(shape, resident, MissMode::split) >= tokens_per_s(shape, resident, mode));
        if (!misses_count(shape, resident + 0.05, mode)) continue;
        CHECK(tokens_per_s(shape, resident + 0.05, mode) > tokens_per_s(shape, resident, mode));
      }
      CHECK(misses_count(shape, 0.7, mode));
    }
  }
}

TEST_CASE("a step is what one computes by hand") {
  std::mt19937_64 engine(std::random_device{}());
  const auto some = [&](double least, double most) {
    return std::uniform_real_distribution<double>(least, most)(engine);
  };
  for (int i = 0; i < 100; ++i) {
    Calibration c = default_calibration(true);
    c.kernels.figures = {some(100, 3000), some(100, 3000), some(100, 3000)};
    c.zero_copy = some(10, 60);
    c.graph = {some(0, 50), some(0, 50), some(0, 50), some(0, 50), some(0, 50)};
    const SpeedShape shape = scout(SliceEncoding::int8);
    const double r = some(0, 0.5), context = some(0, 8000);
    const double int8 = c.kernels[SliceEncoding::int8] * kGb;
    const double outside = static_cast<double>(shape.outside[SliceEncoding::int8]) / int8 +
                           static_cast<double>(shape.head[SliceEncoding::int8]) / int8 +
                           static_cast<double>(shape.kv_per_token) * context / (c.kv_read * kGb);
    const double routed = 48 * static_cast<double>(shape.expert);
    const double inside = (static_cast<double>(shape.shared[SliceEncoding::int8]) + r * routed) / int8;
    const double missed = (1 - r) * routed / (*c.zero_copy * kGb);
    const double fixed =
        kUs *
        (c.graph.step + 48 * (c.graph.layer + c.graph.attention + c.graph.moe_layer + c.graph.miss_layer));
    const auto speed = decode_speed(shape, {r, 1, context, true}, c, MissMode::zero_copy);
    CHECK(1 / speed->tokens_per_s == doctest::Approx(outside + std::max(inside, missed) + fixed));
    CHECK(speed->link_s == doctest::Approx(missed));
    CHECK(speed->cpu_s == 0);
  }
}

TEST_CASE("with both ways, both end together and their bytes add up") {
  Calibration c = default_calibration(true);
  c.beside_zero_copy[SliceEncoding::int8] = SharedRate{80, 20};
  const SpeedShape shape = scout(SliceEncoding::int8);
  const auto speed = decode_speed(shape, {0.5, 1, 0, true}, c, MissMode::split);
  CHECK(speed->cpu_s == doctest::Approx(speed->link_s));
  CHECK(speed->cpu_s * 80e9 + speed->link_s * 20e9 ==
        doctest::Approx(24 * static_cast<double>(shape.expert)));
}

TEST_CASE("the best mode is the fastest one that the machine and the format have") {
  const DecodeLoad load{0.5, 1, 256, true};
  const SpeedShape int8 = scout(SliceEncoding::int8), dense = scout(SliceEncoding::dense);
  Calibration c = default_calibration(true);
  for (double cpu = 5; cpu < 200; cpu += 10) {
    c.cpu_experts[SliceEncoding::int8] = cpu;
    c.beside_zero_copy[SliceEncoding::int8] = SharedRate{cpu * 0.8, 25};
    const DecodeSpeed best = best_decode_speed(int8, load, c, kModes);
    for (const MissMode mode : kModes) {
      CHECK(best.tokens_per_s >= decode_speed(int8, load, c, mode)->tokens_per_s);
    }
  }
  CHECK_FALSE(decode_speed(dense, load, c, MissMode::cpu));
  CHECK_FALSE(decode_speed(dense, load, c, MissMode::split));
  CHECK(best_decode_speed(dense, load, c, kModes).mode == MissMode::fetch);
  constexpr MissMode only_cpu[] = {MissMode::cpu};
  CHECK_THROWS_AS(best_decode_speed(dense, load, c, only_cpu), ConfigError);
  CHECK_FALSE(decode_speed(int8, load, default_calibration(false), MissMode::zero_copy));
}

TEST_CASE("a prediction stays below the bound of its way") {
  const Calibration c = default_calibration(true);
  for (const auto format : {SliceEncoding::dense, SliceEncoding::int8, SliceEncoding::int4}) {
    const SpeedShape shape = scout(format);
    for (double resident = 0; resident <= 1; resident += 0.1) {
      for (const int batch : {1, 4, 64}) {
        for (const MissMode mode : kModes) {
          const auto speed = decode_speed(shape, {resident, batch, 256, true}, c, mode);
          if (!speed) continue;
          const auto bound =
              step_bound_s(step_bytes(shape), resident, way_of(mode), c.ceilings(), batch, 256);
          CHECK(speed->step_s > *bound);
        }
      }
      const PrefillSpeed prefill = prefill_speed(shape, resident, 8192, 2048, c);
      CHECK(prefill.tokens_per_s < prefill.bound_tokens_per_s);
    }
  }
}

TEST_CASE("prefill is bound by the missed bytes in small chunks and by arithmetic in large ones") {
  const Calibration c = default_calibration(true);
  const SpeedShape shape = scout(SliceEncoding::int8);
  const double all = 48.0 * 16 * static_cast<double>(shape.expert);
  const PrefillSpeed small = prefill_speed(shape, 0.5, 8192, 1024, c);
  const double copies = 0.5 * all / (c.link * kGb);
  CHECK(small.tokens_per_s < 1024 / copies);
  CHECK(small.tokens_per_s > 0.8 * 1024 / copies);
  CHECK(small.link_s == doctest::Approx(8 * copies).epsilon(0.01));
  CHECK(small.link_s > small.compute_s);
  CHECK(small.tokens_per_s == doctest::Approx(8192 / (small.link_s + small.compute_s / 3)).epsilon(0.01));
  CHECK(prefill_speed(shape, 0.5, 8192, 8192, c).tokens_per_s > 4 * small.tokens_per_s);
  const PrefillSpeed resident = prefill_speed(shape, 1, 8192, 8192, c);
  CHECK(resident.link_s == 0);
  const double weights = 48.0 * 5120 * (128 * 96 + 2 * 3 * 8192);
  const double operations = 2 * weights * 8192 + 8192.0 * 4096 * shape.operations_per_key;
  CHECK(resident.bound_tokens_per_s ==
        doctest::Approx(8192 / (operations / (c.tensor_tflops * 1e12))).epsilon(0.001));
  CHECK(resident.compute_s > operations / (c.tensor_tflops * 1e12));
}

}  // namespace
}  // namespace lighter::offload
