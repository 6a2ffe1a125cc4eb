#include "models/gptq.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_cholesky_ex.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <tbb/parallel_for.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <string>

#include "runtime/error.h"
#include "runtime/quant/dequantize_rows.h"
#include "runtime/quant/gptq.h"
#include "runtime/quant/quantize.h"

namespace lighter::models {
namespace {

constexpr int64_t kMomentRows = 4096;  // that are fp32 at once
constexpr int64_t kRowsAtOnce = 8192;  // of a matrix that is rounded
constexpr int64_t kGroup = 64;
constexpr int64_t kTaskRows = 64;
// Of the mean of the moments' diagonal, added to it: as the paper does.
constexpr double kDamping = 0.01;

[[noreturn]] void refuse(const std::string& name, int64_t row, SliceEncoding encoding) {
  throw CheckpointError(name + ", row " + std::to_string(row) +
                        ": a NaN, an infinity, or a magnitude above 65504 cannot be stored as " +
                        std::string(encoding_name(encoding)) +
                        "; the checkpoint is damaged, or this weight must stay in the model's dtype");
}

// U, upper triangular in fp32, for which transpose(U) U = inverse(H). With J that turns the order of columns
// around, J H J = L transpose(L), so that U is the inverse of J L J.
at::Tensor inverse_factor(const at::Tensor& moments, const std::string& name) {
  at::Tensor h = moments.clone();
  at::Tensor diagonal = h.diagonal();
  const at::Tensor dead = diagonal.eq(0);
  const int64_t alive = diagonal.numel() - dead.sum().item<int64_t>();
  const double mean = alive == 0 ? 1.0 : diagonal.sum().item<double>() / static_cast<double>(alive);
  if (!std::isfinite(mean)) {
    throw DeviceError(name +
                      ": what the model makes of the text before it is not finite; the weights may be "
                      "damaged, or bf16 too narrow "
                      "for them (try model.dtype: fp32)");
  }
  diagonal.masked_fill_(dead, mean);
  diagonal.add_(kDamping * mean);
  const auto [lower, info] = at::linalg_cholesky_ex(h.flip({0, 1}));
  if (info.item<int>() != 0) {
    throw DeviceError(name + ": the inputs' second moments cannot be factorised (column " +
                      std::to_string(info.item<int>()) + ")");
  }
  const at::Tensor turned = lower.flip({0, 1});
  return at::linalg_solve_triangular(turned, at::eye(h.size(0), h.options()), /*upper=*/true);
}

// C for which W (1 + C) makes of the rounded inputs what W makes of the exact ones, by least squares: the
// drift's products times the inverse that factor's square is. With few tokens that would be their noise.
at::Tensor drift_correction(const Moments& moments, const at::Tensor& factor) {
  const int64_t columns = factor.size(0);
  if (moments.tokens <= columns) return {};
  const double share = 1 - static_cast<double>(columns) / static_cast<double>(moments.tokens);
  return at::mm(at::mm(moments.drift, factor.t()), factor).mul(share).to(at::kFloat);
}

struct GroupWeights {
  explicit GroupWeights(const at::Tensor& factor, int64_t first) {
    block = factor.narrow(0, first, kGroup).narrow(1, first, kGroup).contiguous().cpu();
    double sum = 0;
    const auto cost = [&](int64_t j) {
      const double diagonal = block.const_data_ptr<float>()[j * kGroup + j];
      return 1 / (diagonal * diagonal);
    };
    for (int64_t j = 0; j < kGroup; ++j) sum += cost(j);
    for (int64_t j = 0; j < kGroup; ++j) importance[j] = static_cast<float>(cost(j) * kGroup / sum);
  }
  GptqGroup group() const { return {block.const_data_ptr<float>(), importance.data()}; }

  at::Tensor block;
  std::array<float, kGroup> importance{};
};

// Calls body(first, end) for rows of [0, rows), spread over oneTBB's threads.
template <typename Body>
void for_row_blocks(int64_t rows, const Body& body) {
  tbb::parallel_for(int64_t{0}, (rows + kTaskRows - 1) / kTaskRows,
                    [&](int64_t task) { body(task * kTaskRows, std::min(rows, (task + 1) * kTaskRows)); });
}

// Where a group of a row goes.
struct Place {
  uint8_t* q;
  uint16_t* scale;
  uint16_t* minimum;
};
Place place_of(PackedRows& rows, int64_t row, int64_t group) {
  const int64_t number = row * rows.form.columns / group_size(rows.encoding) + group;
  const int64_t q_bytes = value_bytes(rows.encoding, group_size(rows.encoding));
  std::byte* data = rows.bytes.data();
  return {reinterpret_cast<uint8_t*>(data + rows.form.values_at) + number * q_bytes,
          reinterpret_cast<uint16_t*>(data + rows.form.scales_at) + number,
          reinterpret_cast<uint16_t*>(data + rows.form.minimums_at) + number};
}

// Rows [first, first + count).
void round_rows(const at::Tensor& weight, int64_t first, int64_t count, const at::Tensor& factor,
                const at::Tensor& correction, const std::string& name, PackedRows& to) {
  at::Tensor left = weight.narrow(0, first, count).to(at::kFloat, /*non_blocking=*/false, /*copy=*/true);
  if (correction.defined()) left.add_(at::mm(left, correction));
  const int64_t columns = weight.size(1);
  const at::Tensor errors = at::empty({count, kGroup}, at::kFloat);
  std::atomic<int64_t> bad_row = -1;
  for (int64_t at_column = 0; at_column < columns; at_column += kGroup) {
    const GroupWeights shared(factor, at_column);
    const at::Tensor values = left.narrow(1, at_column, kGroup).contiguous().cpu();
    for_row_blocks(count, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const Place place = place_of(to, first + row, at_column / kGroup);
        if (!gptq_int4(values.const_data_ptr<float>() + row * kGroup, shared.group(), place.q, place.scale,
                       place.minimum, errors.mutable_data_ptr<float>() + row * kGroup)) {
          bad_row = first + row;
        }
      }
    });
    if (bad_row >= 0) refuse(name, bad_row, SliceEncoding::int4);
    const int64_t behind = columns - at_column - kGroup;
    if (behind == 0) break;
    left.narrow(1, at_column + kGroup, behind)
        .addmm_(errors.to(left.device()),
                factor.narrow(0, at_column, kGroup).narrow(1, at_column + kGroup, behind), 1, -1);
  }
}

}  // namespace

Moments::Moments(int64_t columns, const at::Device& device)
    : squares(at::zeros({columns, columns}, at::dtype(at::kDouble).device(device))),
      drift(at::zeros_like(squares)) {}

void Moments::add(const at::Tensor& exact, const at::Tensor& rounded) {
  for (int64_t first = 0; first < rounded.size(0); first += kMomentRows) {
    const int64_t count = std::min(kMomentRows, rounded.size(0) - first);
    const at::Tensor x = rounded.narrow(0, first, count).to(at::kFloat);
    squares.add_(at::mm(x.t(), x));
    drift.add_(at::mm(exact.narrow(0, first, count).to(at::kFloat).sub(x).t(), x));
    tokens += count;
  }
}

PackedRows quantize_matrix(SliceEncoding encoding, const at::Tensor& weight, const Moments& moments,
                           const std::string& name) {
  const int64_t rows = weight.size(0), columns = weight.size(1);
  PackedRows result{encoding, packed_matrix_layout(encoding, rows, columns), {}};
  result.bytes.resize(packed_matrix_bytes(encoding, rows, columns));
  at::Tensor factor, correction;
  if (encoding == SliceEncoding::int4) {
    const at::Tensor exact = inverse_factor(moments.squares, name);
    factor = exact.to(at::kFloat);
    correction = drift_correction(moments, exact);
  }
  for (int64_t first = 0; first < rows; first += kRowsAtOnce) {
    const int64_t count = std::min(kRowsAtOnce, rows - first);
    if (encoding == SliceEncoding::int4) {
      round_rows(weight, first, count, factor, correction, name, result);
      continue;
    }
    const at::Tensor values = weight.narrow(0, first, count).to(at::kFloat).contiguous().cpu();
    for_row_blocks(count, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const Place place = place_of(result, first + row, 0);
        const float* from = values.const_data_ptr<float>() + row * columns;
        if (quantize_int8(from, columns / group_size(encoding), reinterpret_cast<int8_t*>(place.q),
                          place.scale) >= 0) {
          refuse(name, first + row, encoding);
        }
      }
    });
  }
  return result;
}

void dequantize_into(const PackedRows& from, const at::Tensor& to) {
  for (int64_t first = 0; first < from.form.rows; first += kRowsAtOnce) {
    const int64_t count = std::min(kRowsAtOnce, from.form.rows - first);
    const at::Tensor values = at::empty({count, from.form.columns}, at::kFloat);
    dequantize_rows(from.encoding, from.form, from.bytes.data(), first, count, DType::fp32,
                    values.mutable_data_ptr<float>(), from.form.columns);
    to.narrow(0, first, count).copy_(values);
  }
}

}  // namespace lighter::models
