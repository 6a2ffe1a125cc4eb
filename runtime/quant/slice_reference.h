// The slice's computation in double precision, for the tests of all kernels (CPU and GPU). Slow.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "runtime/quant/dequantize.h"
#include "runtime/quant/packed_slice.h"

namespace lighter::slice_reference {

// Activations as the kernels quantize them (activations.h): scale * q for each value, exact in double.
inline std::vector<double> quantized(SliceEncoding encoding, const std::vector<double>& x) {
  const auto size = static_cast<size_t>(group_size(encoding));
  std::vector<double> result(x.size());
  for (size_t first = 0; first < x.size(); first += size) {
    float most = 0;
    for (size_t i = first; i < first + size; ++i) most = std::max(most, std::fabs(static_cast<float>(x[i])));
    const float scale = most / 127.0f;
    for (size_t i = first; i < first + size; ++i) {
      const float steps = scale == 0 ? 0.0f : std::nearbyint(static_cast<float>(x[i]) / scale);
      result[i] = static_cast<double>(scale) * std::clamp(steps, -127.0f, 127.0f);
    }
  }
  return result;
}

// The slice's weights, [rows, columns] of a matrix.
inline std::vector<double> weights(const PackedSliceLayout& layout, const std::byte* slice,
                                   SliceMatrix matrix) {
  std::vector<float> values(static_cast<size_t>(layout.hidden * layout.width));
  dequantize_matrix(layout, slice, matrix, values.data());
  return {values.begin(), values.end()};
}

// y[tokens, rows] = x[tokens, columns] · matrixᵀ
inline std::vector<double> multiply(const std::vector<double>& matrix, const std::vector<double>& x,
                                    int64_t rows, int64_t columns) {
  const int64_t tokens = static_cast<int64_t>(x.size()) / columns;
  std::vector<double> y(static_cast<size_t>(tokens * rows));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (int64_t c = 0; c < columns; ++c) sum += matrix[r * columns + c] * x[t * columns + c];
      y[t * rows + r] = sum;
    }
  }
  return y;
}

// silu(gate · x) * (up · x): [tokens, width].
inline std::vector<double> gate_up(const PackedSliceLayout& layout, const std::byte* slice,
                                   const std::vector<double>& x) {
  auto gate = multiply(weights(layout, slice, SliceMatrix::gate), x, layout.width, layout.hidden);
  const auto up = multiply(weights(layout, slice, SliceMatrix::up), x, layout.width, layout.hidden);
  for (size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
  return gate;
}

inline std::vector<double> down(const PackedSliceLayout& layout, const std::byte* slice,
                                const std::vector<double>& hidden) {
  return multiply(weights(layout, slice, SliceMatrix::down), hidden, layout.hidden, layout.width);
}

// |a - b| / |b| over all elements.
template <typename Values>
double relative_l2(const Values& a, const std::vector<double>& b) {
  double off = 0, all = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    off += (a[i] - b[i]) * (a[i] - b[i]);
    all += b[i] * b[i];
  }
  return std::isnan(off) ? std::numeric_limits<double>::infinity() : std::sqrt(off / all);
}

}  // namespace lighter::slice_reference
