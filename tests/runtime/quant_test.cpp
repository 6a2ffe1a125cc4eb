#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "runtime/error.h"
#include "runtime/float_convert.h"
#include "runtime/quant/dequantize.h"
#include "runtime/quant/half.h"
#include "runtime/quant/quantize.h"
#include "runtime/quant/slice_reference.h"
#include "tests/message_of.h"
#include "tests/runtime/random_slice.h"

namespace lighter {
namespace {

bool mentions(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("fp32 rounds to the nearest fp16 number, ties to even, and to its neighbours on request") {
  int wrong = 0;
  for (unsigned bits = 0; bits < 0x7BFFu; ++bits) {
    const auto low = static_cast<uint16_t>(bits);
    const auto high = static_cast<uint16_t>(bits + 1);
    const float a = fp16_to_fp32(low), b = fp16_to_fp32(high);
    const float middle = (a + b) / 2;  // exact
    const uint16_t even = bits % 2 == 0 ? low : high;
    for (const unsigned sign : {0u, 0x8000u}) {
      const float s = sign ? -1.0f : 1.0f;
      wrong += fp32_to_fp16(s * a) != (low | sign);
      wrong += fp32_to_fp16(s * middle) != (even | sign);
      wrong += fp32_to_fp16(s * std::nextafter(middle, 0.0f)) != (low | sign);
      wrong += fp32_to_fp16(s * std::nextafter(middle, 1e9f)) != (high | sign);
    }
    wrong += fp16_at_least(middle) != high || fp16_at_most(middle) != low;
    wrong += fp16_at_least(a) != low || fp16_at_most(b) != high;
    // Between -b and -a; a may be zero, whose sign does not matter.
    wrong += fp16_to_fp32(fp16_at_least(-middle)) != -a || fp16_to_fp32(fp16_at_most(-middle)) != -b;
  }
  CHECK(wrong == 0);
}

TEST_CASE("a packed slice has the documented offsets and size") {
  const int64_t hidden = 384, width = 512;
  const uint64_t n = hidden * width;
  const auto int8 = packed_slice_layout(SliceEncoding::int8, hidden, width);
  CHECK(int8[SliceMatrix::gate].values_at == 0);
  CHECK(int8[SliceMatrix::up].values_at == n);
  CHECK(int8[SliceMatrix::down].values_at == 2 * n);
  CHECK(int8[SliceMatrix::gate].scales_at == 3 * n);
  CHECK(int8[SliceMatrix::up].scales_at == 3 * n + n / 128 * 2);
  CHECK(int8[SliceMatrix::down].scales_at == 3 * n + 2 * (n / 128 * 2));
  CHECK(int8.bytes == 3 * n + 3 * (n / 128 * 2));
  CHECK(int8[SliceMatrix::up].rows == width);
  CHECK(int8[SliceMatrix::up].columns == hidden);
  CHECK(int8[SliceMatrix::down].rows == hidden);
  CHECK(int8[SliceMatrix::down].columns == width);

  const auto int4 = packed_slice_layout(SliceEncoding::int4, hidden, width);
  const uint64_t scales = n / 64 * 2;
  for (int i = 0; i < 3; ++i) {
    CHECK(int4.matrices[i].values_at == i * n / 2);
    CHECK(int4.matrices[i].scales_at == 3 * n / 2 + i * scales);
    CHECK(int4.matrices[i].minimums_at == 3 * n / 2 + (3 + i) * scales);
    CHECK(int4.matrices[i].minimums_at % 256 == 0);
  }
  CHECK(int4.bytes == 3 * n / 2 + 6 * scales);
  // Bits a weight of a Scout slice: 8.125 and 4.5.
  CHECK(packed_slice_bytes(SliceEncoding::int8, 5120, 256) * 8 * 8 == 3u * 5120 * 256 * 65);
  CHECK(packed_slice_bytes(SliceEncoding::int4, 5120, 256) * 16 == 3u * 5120 * 256 * 9);
}

TEST_CASE("sizes that a packed slice cannot have are refused with the rule") {
  for (const auto encoding : kEncodings) {
    const auto refusal = [&](int64_t hidden, int64_t width) {
      return test::message_of([&] { packed_slice_bytes(encoding, hidden, width); });
    };
    CHECK(refusal(128, 256) == "");
    CHECK(mentions(refusal(64, 256), "hidden size that is a multiple of 128, not 64"));
    CHECK(mentions(refusal(128, 128), "slice width that is a multiple of 256, not 128"));
    CHECK(mentions(refusal(0, 256), "not 0"));
    CHECK(mentions(refusal(128, 65536), "at most 32768"));
  }
  CHECK_THROWS_AS(packed_slice_bytes(SliceEncoding::dense, 128, 256), ConfigError);
}

TEST_CASE("int8 bytes lie where the layout says: values row by row, then a scale per 128") {
  const int64_t hidden = 128, width = 256;
  const size_t n = hidden * width;
  // Multiples of the scale 2^-7, each group's largest 127 of them: stored exactly.
  const auto whole = [&](SliceMatrix matrix, size_t i) {
    return i % 128 == 0 ? 127
                        : static_cast<int>((i * 37 + i / 128 + static_cast<size_t>(matrix) * 11) % 255) - 127;
  };
  const auto exponent = [](SliceMatrix matrix, size_t i) {
    return static_cast<int>((i / 128 + static_cast<size_t>(matrix)) % 9) - 7;
  };
  std::vector<float> values[3];
  for (const auto matrix : kMatrices) {
    for (size_t i = 0; i < n; ++i) {
      values[static_cast<int>(matrix)].push_back(
          std::ldexp(static_cast<float>(whole(matrix, i)), exponent(matrix, i)));
    }
  }
  auto slice = slice_memory(SliceEncoding::int8, hidden, width);
  pack_slice(SliceEncoding::int8, hidden, width, values[0].data(), values[1].data(), values[2].data(),
             slice.data());
  int wrong = 0;
  for (const auto matrix : kMatrices) {
    const auto m = static_cast<size_t>(matrix);
    for (size_t i = 0; i < n; ++i) {
      wrong += static_cast<int8_t>(slice[m * n + i]) != whole(matrix, i);
      uint16_t scale;
      std::memcpy(&scale, slice.data() + 3 * n + (m * n + i) / 128 * 2, 2);
      wrong += scale != (15 + exponent(matrix, i)) << 10;  // fp16 of a power of two
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("int4 bytes lie where the layout says: 32 bytes a group, value j low and value j + 32 high") {
  const int64_t hidden = 128, width = 256;
  const size_t n = hidden * width;
  const auto level = [](SliceMatrix matrix, size_t i) {
    const size_t j = i % 64;
    // Every group holds 0 and 15, and every level at some place.
    return j == 5    ? 0u
           : j == 41 ? 15u
                     : static_cast<unsigned>((i * 7 + i / 64 + static_cast<size_t>(matrix)) % 16);
  };
  const auto exponent = [](SliceMatrix matrix, size_t i) {
    return static_cast<int>((i / 64 + static_cast<size_t>(matrix)) % 5) - 4;
  };
  const auto minimum = [](SliceMatrix matrix, size_t i) {  // in units of the scale
    return static_cast<float>(i / 64 % 3) - 8.0f - static_cast<float>(matrix);
  };
  std::vector<float> values[3];
  for (const auto matrix : kMatrices) {
    for (size_t i = 0; i < n; ++i) {
      values[static_cast<int>(matrix)].push_back(
          std::ldexp(static_cast<float>(level(matrix, i)) + minimum(matrix, i), exponent(matrix, i)));
    }
  }
  auto slice = slice_memory(SliceEncoding::int4, hidden, width);
  pack_slice(SliceEncoding::int4, hidden, width, values[0].data(), values[1].data(), values[2].data(),
             slice.data());
  const auto half_at = [&](size_t at) {
    uint16_t bits;
    std::memcpy(&bits, slice.data() + at, 2);
    return fp16_to_fp32(bits);
  };
  int wrong = 0;
  for (const auto matrix : kMatrices) {
    const auto m = static_cast<size_t>(matrix);
    for (size_t i = 0; i < n; ++i) {
      const size_t group = i / 64, j = i % 64;
      const auto both = static_cast<unsigned>(slice[m * n / 2 + group * 32 + j % 32]);
      wrong += (j < 32 ? both & 15 : both >> 4) != level(matrix, i);
      wrong += half_at(3 * n / 2 + (m * n / 64 + group) * 2) != std::ldexp(1.0f, exponent(matrix, i));
      wrong += half_at(3 * n / 2 + ((3 + m) * n / 64 + group) * 2) !=
               std::ldexp(minimum(matrix, i), exponent(matrix, i));
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("dequantizing returns normal data within the formats' error: 0.7 % and 8.3 %") {
  for (const auto encoding : kEncodings) {
    const RandomSlice slice(encoding, 1024, 512, 7);
    for (const auto matrix : kMatrices) {
      std::vector<float> back(1024 * 512);
      dequantize_matrix(slice.layout, slice.bytes.data(), matrix, back.data());
      const auto original = doubles(slice.matrices[static_cast<int>(matrix)]);
      const double error = slice_reference::relative_l2(back, original);
      CHECK(error < (encoding == SliceEncoding::int8 ? 0.007 : 0.083));
      CHECK(error > (encoding == SliceEncoding::int8 ? 0.005 : 0.07));  // less would not be these formats
    }
  }
}

TEST_CASE(
    "no int8 value is off by more than half a step, and no int4 group is worse than rounding in its range") {
  std::mt19937 random(11);
  std::uniform_real_distribution<float> uniform(-1, 1);
  for (int round = 0; round < 400; ++round) {
    // Magnitudes from below fp16's smallest to near its largest, centred and not, some groups of a few values
    // only.
    const float size = std::ldexp(1.0f, static_cast<int>(random() % 40) - 26);
    const float centre = round % 3 == 0 ? 0 : uniform(random) * 32000;
    std::vector<float> values(128);
    for (float& value : values) {
      value = round % 5 == 4 ? std::copysign(size, uniform(random)) : uniform(random) * size;
      value = value * (round % 7 == 6 ? uniform(random) * uniform(random) : 1.0f) + centre;
    }
    if (round % 50 == 0) std::fill(values.begin(), values.end(), centre);

    std::vector<int8_t> q8(128);
    uint16_t scale8;
    REQUIRE(quantize_int8(values.data(), 1, q8.data(), &scale8) == -1);
    const double step8 = fp16_to_fp32(scale8);
    for (int i = 0; i < 128; ++i) {
      REQUIRE(q8[i] >= -127);
      REQUIRE(std::fabs(q8[i] * step8 - values[i]) <= step8 * 0.50002);
    }

    std::vector<uint8_t> q4(64);
    uint16_t scales[2], minimums[2];
    REQUIRE(quantize_int4(values.data(), 2, q4.data(), scales, minimums) == -1);
    for (int g = 0; g < 2; ++g) {
      const auto [low, high] = std::minmax_element(values.begin() + g * 64, values.begin() + g * 64 + 64);
      const double floor = fp16_to_fp32(fp16_at_most(*low));
      const double step = fp16_to_fp32(fp16_at_least(static_cast<float>((*high - floor) / 15)));
      double error = 0, plain = 0;
      for (int j = 0; j < 64; ++j) {
        const double value = values[g * 64 + j];
        const unsigned both = q4[g * 32 + j % 32];
        const double q = j < 32 ? both & 15 : both >> 4;
        const double off = fp16_to_fp32(scales[g]) * q + fp16_to_fp32(minimums[g]) - value;
        error += off * off;
        const double rounded = step == 0 ? 0.0 : std::nearbyint((value - floor) / step);
        plain += (rounded * step + floor - value) * (rounded * step + floor - value);
      }
      REQUIRE(error <= plain * 1.001);
    }
  }
}

// Relative errors of all groups together: of int4 as it is stored, and of rounding within [min, max].
std::pair<double, double> int4_errors(const std::vector<float>& values) {
  const auto groups = static_cast<int64_t>(values.size() / 64);
  std::vector<uint8_t> q(values.size() / 2);
  std::vector<uint16_t> scales(groups), minimums(groups);
  REQUIRE(quantize_int4(values.data(), groups, q.data(), scales.data(), minimums.data()) == -1);
  double stored = 0, nearest = 0, size = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const float* group = values.data() + g * 64;
    const auto [low, high] = std::minmax_element(group, group + 64);
    const double step = (*high - *low) / 15.0;
    for (int j = 0; j < 64; ++j) {
      const unsigned both = q[g * 32 + j % 32];
      const double level = j < 32 ? both & 15 : both >> 4;
      stored += std::pow(fp16_to_fp32(scales[g]) * level + fp16_to_fp32(minimums[g]) - group[j], 2);
      const double rounded = step == 0 ? 0.0 : std::nearbyint((group[j] - *low) / step);
      nearest += std::pow(rounded * step + *low - group[j], 2);
      size += std::pow(static_cast<double>(group[j]), 2);
    }
  }
  return {std::sqrt(stored / size), std::sqrt(nearest / size)};
}

// All bf16 values of a tensor, in their order, as the file has it.
std::vector<float> tensor_of(const std::filesystem::path& safetensors, const std::string& name) {
  std::ifstream file(safetensors, std::ios::binary);
  uint64_t length = 0;
  file.read(reinterpret_cast<char*>(&length), sizeof length);
  std::string header(length, ' ');
  file.read(header.data(), static_cast<std::streamsize>(length));
  const auto offsets = nlohmann::json::parse(header).at(name).at("data_offsets").get<std::vector<uint64_t>>();
  std::vector<uint16_t> halves((offsets[1] - offsets[0]) / 2);
  file.seekg(static_cast<std::streamoff>(8 + length + offsets[0]));
  file.read(reinterpret_cast<char*>(halves.data()), static_cast<std::streamsize>(halves.size() * 2));
  REQUIRE(file.good());
  std::vector<float> values(halves.size());
  bf16_to_fp32(halves.data(), values.data(), values.size());
  return values;
}

TEST_CASE(
    "int4 leaves clearly less error than rounding in the range, on normal data and on trained weights") {
  std::mt19937 random(std::random_device{}());
  std::normal_distribution<float> normal;
  std::vector<float> values(64 * 2000);
  for (float& value : values) value = normal(random);
  const auto [stored, nearest] = int4_errors(values);
  CHECK(stored < 0.92 * nearest);

  const std::filesystem::path model = std::string(LIGHTER_SOURCE_DIR) + "/models/tiny/model.safetensors";
  for (const std::string name : {"lm_head.weight", "model.layers.2.self_attn.q_proj.weight",
                                 "model.layers.3.feed_forward.shared_expert.down_proj.weight",
                                 "model.layers.4.feed_forward.experts.gate_up_proj"}) {
    CAPTURE(name);
    const auto [trained, trained_nearest] = int4_errors(tensor_of(model, name));
    CHECK(trained < 0.92 * trained_nearest);
    CHECK(trained < 0.09);
  }
}

TEST_CASE("a slice packed by rows, by parts, transposed and from several threads has the same bytes") {
  const int64_t hidden = 384, width = 256;
  for (const auto encoding : kEncodings) {
    const RandomSlice whole(encoding, hidden, width, 21);
    auto parts = slice_memory(encoding, hidden, width);
    const SlicePacker by_parts(encoding, hidden, width, parts.data());
    const auto pack_rows = [&](int64_t remainder) {
      for (const auto matrix : kMatrices) {
        const int64_t rows = whole.layout[matrix].rows, columns = whole.layout[matrix].columns;
        const float* values = whole.matrices[static_cast<int>(matrix)].data();
        for (int64_t row = remainder; row < rows; row += 3) {
          for (int64_t first = columns - 128; first >= 0; first -= 128) {
            by_parts.pack_part(matrix, row, first, 128, values + row * columns + first);
          }
        }
      }
    };
    std::thread one(pack_rows, 0), two(pack_rows, 1);
    pack_rows(2);
    one.join();
    two.join();
    CHECK(parts == whole.bytes);

    auto turned = slice_memory(encoding, hidden, width);
    const SlicePacker packer(encoding, hidden, width, turned.data());
    for (const auto matrix : kMatrices) {
      const int64_t rows = whole.layout[matrix].rows, columns = whole.layout[matrix].columns;
      const float* values = whole.matrices[static_cast<int>(matrix)].data();
      std::vector<float> transposed(rows * columns);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) transposed[c * rows + r] = values[r * columns + c];
      }
      const int64_t cut = 100;  // not a multiple of the tiles inside
      packer.pack_transposed(matrix, 0, cut, 0, columns, transposed.data(), rows);
      packer.pack_transposed(matrix, cut, rows - cut, 0, 128, transposed.data() + cut, rows);
      packer.pack_transposed(matrix, cut, rows - cut, 128, columns - 128,
                             transposed.data() + 128 * rows + cut, rows);
    }
    CHECK(turned == whole.bytes);
  }
}

TEST_CASE("weights that fp16 scales cannot hold are a CheckpointError that names the place") {
  for (const auto encoding : kEncodings) {
    auto slice = slice_memory(encoding, 256, 256);
    const SlicePacker packer(encoding, 256, 256, slice.data());
    for (const float bad : {NAN, INFINITY, -INFINITY, 65520.0f, -1e30f}) {
      for (const int column : {0, 63, 130, 255}) {
        std::vector<float> row(256, 0.5f);
        row[column] = bad;
        CHECK_THROWS_AS(packer.pack_row(SliceMatrix::up, 17, row.data()), CheckpointError);
        const auto message = test::message_of([&] { packer.pack_row(SliceMatrix::up, 17, row.data()); });
        const auto size = group_size(encoding);
        const int64_t first = column / size * size;
        CHECK(mentions(message, "up row 17"));
        CHECK(mentions(message,
                       "columns " + std::to_string(first) + " to " + std::to_string(first + size - 1)));
      }
    }
    const std::vector<float> largest(256, -65504.0f);
    packer.pack_row(SliceMatrix::gate, 0, largest.data());
    CHECK(packed_value(packed_slice_layout(encoding, 256, 256), slice.data(), SliceMatrix::gate, 0, 9) ==
          doctest::Approx(-65504.0).epsilon(0.001));
  }
}

}  // namespace lighter
