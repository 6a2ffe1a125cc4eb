#include <doctest/doctest.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "runtime/error.h"
#include "runtime/quant/cpu_slice.h"
#include "runtime/quant/half.h"
#include "runtime/quant/slice_reference.h"
#include "tests/runtime/random_slice.h"

namespace lighter {

namespace reference = slice_reference;

TEST_CASE("after a head start a prefetch stream asks for every second line, until that is used up") {
  const std::vector<uint8_t> row(6400);
  const auto bytes = static_cast<int64_t>(row.size());
  const PrefetchRange range{row.data(), bytes, bytes, 1, nullptr, nullptr, 0};
  PrefetchStream stream(&range, &range + 1);
  stream.ask_bytes(640);
  stream.add_head_start(256);
  std::vector<int64_t> taken;  // lines; -1: nothing new
  for (int i = 0; i < 12; ++i) {
    int64_t steps = 1;
    const uint8_t* const from = stream.take_steps(1, steps, nullptr);
    taken.push_back(from == nullptr ? -1 : (from - row.data()) / 64);
  }
  CHECK(taken == std::vector<int64_t>{-1, 10, -1, 11, -1, 12, -1, 13, 14, 15, 16, 17});
  // All of it, also where a row has more steps.
  stream.add_head_start(128);
  for (const auto& [line, count] : std::vector<std::pair<int64_t, int64_t>>{{18, 2}, {-1, 2}, {20, 3}}) {
    int64_t steps = 3;
    const uint8_t* const from = stream.take_steps(1, steps, nullptr);
    CHECK((from == nullptr ? -1 : (from - row.data()) / 64) == line);
    CHECK(steps == count);
  }
}

TEST_CASE("CPU kernels agree with the integer-faithful reference, for 1 to 17 tokens of several shapes") {
  struct Shape {
    int64_t hidden, width, tokens;
  };
  // 1152 and 640: groups that fill neither 16 lanes nor a period of scales.
  const Shape shapes[] = {{128, 256, 1}, {640, 256, 3},   {1152, 512, 2},
                          {256, 768, 5}, {2048, 256, 16}, {384, 256, 17}};
  unsigned seed = 100;
  for (const auto encoding : kEncodings) {
    for (const auto [hidden, width, tokens] : shapes) {
      const RandomSlice slice(encoding, hidden, width, seed += 10);
      const auto x = normal(tokens * hidden, 1, seed + 5);
      const auto& layout = slice.layout;
      const CpuSliceKernel kernel(encoding, hidden, width);
      CAPTURE(encoding_name(encoding));
      CAPTURE(hidden);
      CAPTURE(tokens);

      std::vector<float> sum(x.size(), 0.25f);
      CpuScratch scratch;
      kernel.accumulate(slice.bytes.data(), x.data(), tokens, sum.data(), scratch);
      for (float& value : sum) value -= 0.25f;
      // What 8-bit activations explain, and no more.
      const auto exact = reference::down(layout, slice.bytes.data(),
                                         reference::gate_up(layout, slice.bytes.data(), doubles(x)));
      const auto quantized_input = reference::quantized(encoding, doubles(x));
      const auto faithful_values = reference::gate_up(layout, slice.bytes.data(), quantized_input);
      const auto explained =
          reference::down(layout, slice.bytes.data(), reference::quantized(encoding, faithful_values));
      CHECK(reference::relative_l2(sum, exact) < 1.02 * reference::relative_l2(explained, exact));
      CHECK(reference::relative_l2(sum, exact) < 0.02);

      // Each half on the very operand that it got: a rounding that tips the other way must not count.
      if (tokens > 16) continue;
      QuantizedActivations input, between;
      std::vector<float> values(tokens * width);
      kernel.quantize_input(x.data(), tokens, input);
      kernel.gate_up(slice.bytes.data(), input, 0, width, values.data());
      CHECK(reference::relative_l2(values, faithful_values) < 2e-6);
      kernel.quantize_hidden(values.data(), tokens, between);
      std::vector<float> result(tokens * hidden);
      kernel.down(slice.bytes.data(), between, 0, hidden, result.data());
      const auto faithful =
          reference::down(layout, slice.bytes.data(), reference::quantized(encoding, doubles(values)));
      CHECK(reference::relative_l2(result, faithful) < 2e-6);
      CHECK(reference::relative_l2(sum, doubles(result)) < 1e-5);  // added to 0.25 and taken off again
    }
  }
}

TEST_CASE("all CPU paths give the same bits for each token, with any number of threads and alignment") {
  unsigned seed = 500;
  for (const auto encoding : kEncodings) {
    for (const auto& [hidden, width] : {std::pair<int64_t, int64_t>{640, 256}, {1152, 512}}) {
      const RandomSlice slice(encoding, hidden, width, seed += 10);
      const int64_t tokens = 4;
      const auto x = normal(tokens * hidden, 3, seed + 5);
      const auto start = normal(tokens * hidden, 1, seed + 6);
      std::vector<float> expected = start;
      CpuScratch scratch;
      CpuSliceKernel(encoding, hidden, width, CpuPath::scalar)
          .accumulate(slice.bytes.data(), x.data(), tokens, expected.data(), scratch);
      const auto same_bits = [&](const std::vector<float>& sum) {
        return std::memcmp(sum.data(), expected.data(), sum.size() * sizeof(float)) == 0;
      };
      for (const CpuPath path : supported_cpu_paths()) {
        CAPTURE(path_name(path));
        CAPTURE(encoding_name(encoding));
        const CpuSliceKernel kernel(encoding, hidden, width, path);
        std::vector<float> sum = start;
        for (int64_t t = 0; t < tokens; ++t) {  // each alone
          kernel.accumulate(slice.bytes.data(), x.data() + t * hidden, 1, sum.data() + t * hidden, scratch);
        }
        CHECK(same_bits(sum));
        if (path == CpuPath::amx) continue;  // which multiplies several in its own order

        sum = start;
        kernel.accumulate(slice.bytes.data(), x.data(), tokens, sum.data(), scratch);
        CHECK(same_bits(sum));

        sum = start;
        tbb::task_arena arena(2);
        arena.execute([&] {
          kernel.accumulate(slice.bytes.data(), x.data(), tokens, sum.data(), scratch, CpuThreads::tbb);
        });
        CHECK(same_bits(sum));

        // x and sum at 4 bytes past any vector's boundary, the slice at 2.
        std::vector<float> x_at(x.size() + 1), sum_at(x.size() + 1);
        std::copy(x.begin(), x.end(), x_at.begin() + 1);
        std::copy(start.begin(), start.end(), sum_at.begin() + 1);
        std::vector<std::byte> slice_at(slice.bytes.size() + 2);
        std::copy(slice.bytes.begin(), slice.bytes.end(), slice_at.begin() + 2);
        kernel.accumulate(slice_at.data() + 2, x_at.data() + 1, tokens, sum_at.data() + 1, scratch);
        CHECK(same_bits({sum_at.begin() + 1, sum_at.end()}));
      }
    }
  }
}

TEST_CASE("many tokens agree with the reference on each path, for any rows and columns of a slice") {
  if (supported_cpu_paths().back() != CpuPath::amx) {
    MESSAGE("this processor has no AMX, or keeps it from us: that path is not tested here");
  }
  unsigned seed = 700;
  const int64_t hidden = 640, width = 512;
  for (const auto encoding : kEncodings) {
    const int64_t group = group_size(encoding);
    const RandomSlice slice(encoding, hidden, width, seed += 10);
    const std::byte* bytes = slice.bytes.data();
    for (const int64_t tokens : {2, 3, 4, 5, 8, 11, 16, 29}) {
      const auto rows = normal(tokens * hidden, 2, seed + 5);
      const auto between = normal(tokens * width, 1, seed + 6);
      std::vector<int32_t> index(tokens);
      for (int64_t t = 0; t < tokens; ++t) index[t] = static_cast<int32_t>((t * 7 + 3) % tokens);
      for (const CpuPath path : supported_cpu_paths()) {
        CAPTURE(path_name(path));
        CAPTURE(encoding_name(encoding));
        CAPTURE(tokens);
        const CpuSliceKernel kernel(encoding, hidden, width, path);
        QuantizedActivations input, part;
        input.assign(encoding, rows.data(), tokens, hidden);
        PrefetchStream ahead;
        std::vector<float> values(tokens * width);
        for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 4}, {4, 64}, {64, width}}) {
          kernel.gate_up(bytes, {input, index.data(), tokens}, begin, end, values.data() + begin, width,
                         ahead);
        }
        const auto faithful =
            reference::gate_up(slice.layout, bytes, reference::quantized(encoding, doubles(rows)));
        std::vector<double> expected;
        for (int64_t t = 0; t < tokens; ++t) {
          expected.insert(expected.end(), faithful.begin() + index[t] * width,
                          faithful.begin() + (index[t] + 1) * width);
        }
        CHECK(reference::relative_l2(values, expected) < 2e-6);

        // An odd number of groups, not from the first on; the reference has zeros in the other columns.
        const SliceColumns columns{group, 4 * group};
        std::vector<float> there, padded(tokens * width, 0.0f);
        for (int64_t t = 0; t < tokens; ++t) {
          for (int64_t c = columns.begin; c < columns.end; ++c) {
            there.push_back(between[t * width + c]);
            padded[t * width + c] = between[t * width + c];
          }
        }
        part.assign(encoding, there.data(), tokens, columns.count());
        std::vector<float> sums(tokens * hidden);
        for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 24}, {24, hidden}}) {
          kernel.down(bytes, columns, {part, nullptr, tokens}, begin, end,
                      {sums.data() + begin, hidden, nullptr, nullptr}, ahead);
        }
        const auto whole =
            reference::down(slice.layout, bytes, reference::quantized(encoding, doubles(padded)));
        CHECK(reference::relative_l2(sums, whole) < 2e-6);
      }
    }
  }
}

TEST_CASE("the largest levels and activations do not overflow any path's integers") {
  for (const auto encoding : kEncodings) {
    const int64_t hidden = 1024, width = 256;
    const auto layout = packed_slice_layout(encoding, hidden, width);
    std::vector<std::byte> slice(layout.bytes);
    const uint16_t one = fp32_to_fp16(1.0f), tiny = fp32_to_fp16(0x1p-14f);
    for (const auto matrix : kMatrices) {
      const PackedMatrix& part = layout[matrix];
      const bool negative = matrix == SliceMatrix::up;
      const int level = encoding == SliceEncoding::int4 ? 0xFF : negative ? -127 : 127;
      const int64_t weights = hidden * width;
      std::memset(slice.data() + part.values_at, level,
                  encoding == SliceEncoding::int8 ? weights : weights / 2);
      for (int64_t g = 0; g < weights / group_size(encoding); ++g) {
        std::memcpy(slice.data() + part.scales_at + 2 * g, matrix == SliceMatrix::gate ? &tiny : &one, 2);
      }
    }
    for (const int64_t tokens : {1, 9}) {
      std::vector<float> x(tokens * hidden, 127.0f);
      const auto values = reference::gate_up(layout, slice.data(), doubles(x));
      for (const CpuPath path : supported_cpu_paths()) {
        const CpuSliceKernel kernel(encoding, hidden, width, path);
        QuantizedActivations input;
        kernel.quantize_input(x.data(), tokens, input);
        std::vector<float> got(tokens * width);
        kernel.gate_up(slice.data(), input, 0, width, got.data());
        CHECK(reference::relative_l2(got, values) < 1e-6);
      }
    }
  }
}

TEST_CASE("quiet activations cost nothing and loud ones are not hidden") {
  for (const auto encoding : kEncodings) {
    const int64_t hidden = 256, width = 256;
    const RandomSlice slice(encoding, hidden, width, 900);
    for (const CpuPath path : supported_cpu_paths()) {
      const CpuSliceKernel kernel(encoding, hidden, width, path);
      CpuScratch scratch;
      std::vector<float> x(hidden, 0.0f), sum(hidden, 1.5f);
      kernel.accumulate(slice.bytes.data(), x.data(), 1, sum.data(), scratch);
      CHECK(sum == std::vector<float>(hidden, 1.5f));
      std::fill(x.begin(), x.end(), 1e-44f);  // so small that the scale is 0 or one bit
      kernel.accumulate(slice.bytes.data(), x.data(), 1, sum.data(), scratch);
      CHECK(sum == std::vector<float>(hidden, 1.5f));
      for (const float bad : {NAN, INFINITY}) {
        std::fill(sum.begin(), sum.end(), 0.0f);
        x.assign(hidden, 1.0f);
        x[77] = bad;
        kernel.accumulate(slice.bytes.data(), x.data(), 1, sum.data(), scratch);
        CHECK(std::all_of(sum.begin(), sum.end(), [](float value) { return std::isnan(value); }));
      }
    }
  }
}

TEST_CASE("a step refuses more tokens than it has room for") {
  const CpuSliceKernel kernel(SliceEncoding::int8, 128, 256);
  const std::vector<float> x(17 * 128);
  QuantizedActivations input;
  CHECK_THROWS_AS(kernel.quantize_input(x.data(), 17, input), CapacityError);
}

TEST_CASE("activation rows hold what activations.h says, for numbers of any size and halves between levels") {
  constexpr int64_t tokens = 60;
  auto x = normal(tokens * 256, 2, 42);
  for (int64_t i = 0; i < tokens * 256; ++i) x[i] = std::ldexp(x[i], static_cast<int>(4 * (i / 256) - 116));
  for (int64_t i = 0; i < 256; ++i) x[i] = i % 64 == 5 ? 127.0f : static_cast<float>(i % 64) - 31.5f;
  for (const auto encoding : kEncodings) {
    QuantizedActivations rows, again;
    rows.resize(encoding, tokens, 256);
    again.resize(encoding, tokens, 256);
    const int64_t size = group_size(encoding);
    CHECK(rows.groups() == 256 / size);
    int wrong = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      const float weight = t % 3 == 2 ? 0.7f : 1.0f;
      rows.assign_row(t, x.data() + t * 256, weight);
      std::vector<int8_t> q_in_order;
      std::vector<float> q_scales;
      for (int64_t g = 0; g < rows.groups(); ++g) {
        float most = 0;
        const auto value = [&](int64_t i) { return x[t * 256 + g * size + i]; };
        for (int64_t i = 0; i < size; ++i) most = std::max(most, std::fabs(value(i)));
        const float scale = most / 127.0f;
        wrong += rows.scales(t)[g] != scale * weight;
        q_scales.push_back(scale);
        int sum = 0;
        for (int64_t i = 0; i < size; ++i) {
          const auto q = static_cast<int>(std::nearbyint(value(i) / scale));
          const int64_t at =
              encoding == SliceEncoding::int8 ? g * 128 + i : g / 2 * 128 + i / 32 * 64 + g % 2 * 32 + i % 32;
          wrong += rows.values(t)[at] != q;
          q_in_order.push_back(static_cast<int8_t>(q));
          sum += q;
        }
        if (encoding == SliceEncoding::int4) {
          wrong += rows.scaled_sums(t)[g] != scale * weight * static_cast<float>(sum);
        } else {
          int corrections = 0;
          for (int64_t l = 0; l < 16; ++l) corrections += rows.corrections(t)[g * 16 + l];
          wrong += corrections != -128 * sum;
        }
      }
      for (int64_t i = 0; i < 16; ++i)
        wrong += rows.scales(t)[rows.groups() + i] != rows.scales(t)[i % rows.groups()];
      // What somebody else has quantized becomes the same.
      again.assign_quantized_row(t, q_in_order.data(), q_scales.data(), weight);
      wrong += !std::equal(rows.values(t), rows.values(t) + 256, again.values(t));
      wrong += !std::equal(rows.scales(t), rows.scales(t) + rows.groups() + 16, again.scales(t));
      if (encoding == SliceEncoding::int4) {
        wrong += !std::equal(rows.scaled_sums(t), rows.scaled_sums(t) + rows.groups(), again.scaled_sums(t));
      } else {
        wrong +=
            !std::equal(rows.corrections(t), rows.corrections(t) + rows.groups() * 16, again.corrections(t));
      }
    }
    CHECK(wrong == 0);
  }
  // Numbers of 150 times fp32's smallest: the scale is the smallest itself.
  x.assign(256, std::ldexp(150.0f, -149));
  QuantizedActivations rows;
  rows.assign(SliceEncoding::int8, x.data(), 1, 256);
  CHECK(std::all_of(rows.values(0), rows.values(0) + 256, [](int8_t q) { return q == 127; }));
}

}  // namespace lighter
