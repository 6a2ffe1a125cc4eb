// Packed matrices: their layout, products and unpacking.
#include <doctest/doctest.h>

#include <cmath>

#include "runtime/error.h"
#include "runtime/float_convert.h"
#include "runtime/quant/cpu_kernels.h"
#include "runtime/quant/cpu_matrix.h"
#include "runtime/quant/cpu_slice.h"
#include "runtime/quant/dequantize_rows.h"
#include "runtime/quant/packed_weight.h"
#include "tests/runtime/random_slice.h"

using namespace lighter;

namespace {

struct RandomMatrix {
  RandomMatrix(SliceEncoding encoding, int64_t rows, int64_t columns, unsigned seed)
      : layout(packed_matrix_layout(encoding, rows, columns)),
        bytes(packed_matrix_bytes(encoding, rows, columns)),
        values(
            normal(static_cast<size_t>(rows * columns), 1 / std::sqrt(static_cast<float>(columns)), seed)) {
    const int64_t groups = rows * columns / group_size(encoding);
    auto* scales = reinterpret_cast<uint16_t*>(bytes.data() + layout.scales_at);
    auto* minimums = reinterpret_cast<uint16_t*>(bytes.data() + layout.minimums_at);
    if (encoding == SliceEncoding::int8) {
      quantize_int8(values.data(), groups, reinterpret_cast<int8_t*>(bytes.data()), scales);
    } else {
      quantize_int4(values.data(), groups, reinterpret_cast<uint8_t*>(bytes.data()), scales, minimums);
    }
  }
  PackedMatrix layout;
  std::vector<std::byte> bytes;
  std::vector<float> values;
};

double relative(double error, double size) {
  return std::sqrt(error / size);
}

}  // namespace

TEST_CASE("a packed matrix takes 8.125 or 4.5 bits a weight, its parts one after the other") {
  const PackedMatrix int8 = packed_matrix_layout(SliceEncoding::int8, 48, 640);
  CHECK(int8.scales_at == 48 * 640);
  CHECK(packed_matrix_bytes(SliceEncoding::int8, 48, 640) == 48 * 640 * 65 / 64);
  const PackedMatrix int4 = packed_matrix_layout(SliceEncoding::int4, 48, 640);
  CHECK(int4.scales_at == 48 * 320);
  CHECK(int4.minimums_at == 48 * 320 + 48 * 10 * 2);
  CHECK(packed_matrix_bytes(SliceEncoding::int4, 48, 640) == 48 * 640 * 9 / 16);
  CHECK_THROWS_AS(packed_matrix_layout(SliceEncoding::int8, 47, 640), ConfigError);
  CHECK_THROWS_AS(packed_matrix_layout(SliceEncoding::int4, 48, 64), ConfigError);
  CHECK_THROWS_AS(packed_matrix_layout(SliceEncoding::dense, 48, 640), ConfigError);
  CHECK(PackedWeight{SliceEncoding::int4, 48, 640}.bytes() == 48 * 640 * 9 / 16);
  CHECK(PackedWeight{SliceEncoding::int8, 256, 256, 3, 512}.bytes() ==
        3 * packed_slice_bytes(SliceEncoding::int8, 256, 512));
}

TEST_CASE("unpacked rows are near the weights, wherever they begin and however far they lie apart") {
  constexpr int64_t rows = 48, columns = 384;
  for (const SliceEncoding encoding : kEncodings) {
    CAPTURE(encoding_name(encoding));
    const RandomMatrix matrix(encoding, rows, columns, 11);
    std::vector<float> all(rows * columns);
    dequantize_rows(encoding, matrix.layout, matrix.bytes.data(), 0, rows, DType::fp32, all.data(), columns);
    double error = 0, size = 0;
    for (size_t i = 0; i < all.size(); ++i) {
      error += std::pow(all[i] - matrix.values[i], 2.0);
      size += std::pow(matrix.values[i], 2.0);
    }
    CHECK(relative(error, size) < (encoding == SliceEncoding::int8 ? 0.01 : 0.09));
    constexpr int64_t first = 5, count = 21, stride = 400;
    std::vector<uint16_t> some(count * stride, 7);
    dequantize_rows(encoding, matrix.layout, matrix.bytes.data(), first, count, DType::bf16, some.data(),
                    stride);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < columns; ++c) {
        REQUIRE(some[i * stride + c] == fp32_to_bf16(all[(first + i) * columns + c]));
      }
      REQUIRE(some[i * stride + columns] == 7);
    }
  }
}

TEST_CASE("products with a packed matrix are near fp64's, whatever the number of tokens") {
  constexpr int64_t rows = 336, columns = 640;
  for (const SliceEncoding encoding : kEncodings) {
    const RandomMatrix matrix(encoding, rows, columns, 21);
    std::vector<float> weights(rows * columns);
    dequantize_rows(encoding, matrix.layout, matrix.bytes.data(), 0, rows, DType::fp32, weights.data(),
                    columns);
    const auto x = normal(kMostMatrixTokens * columns, 1, 22);
    QuantizedActivations scratch;
    std::vector<float> alone(rows);
    cpu_matrix_product(encoding, matrix.layout, matrix.bytes.data(), x.data(), 1, alone.data(), scratch);
    for (const int64_t tokens : {1, 3, 16}) {
      CAPTURE(encoding_name(encoding));
      CAPTURE(tokens);
      std::vector<float> out(tokens * rows, -99.0f);
      cpu_matrix_product(encoding, matrix.layout, matrix.bytes.data(), x.data(), tokens, out.data(), scratch);
      const bool one_order = tokens == 1 || supported_cpu_paths().back() != CpuPath::amx;
      if (one_order) CHECK(std::equal(alone.begin(), alone.end(), out.begin()));
      double error = 0, size = 0;
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t r = 0; r < rows; ++r) {
          double exact = 0;
          for (int64_t c = 0; c < columns; ++c)
            exact += static_cast<double>(weights[r * columns + c]) * x[t * columns + c];
          error += std::pow(out[t * rows + r] - exact, 2);
          size += exact * exact;
        }
      }
      CHECK(relative(error, size) < 0.01);  // the activations' int8
    }
    std::vector<float> out(17 * rows);
    CHECK_THROWS_AS(
        cpu_matrix_product(encoding, matrix.layout, matrix.bytes.data(), x.data(), 17, out.data(), scratch),
        CapacityError);
  }
}
