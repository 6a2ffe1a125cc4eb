// Whole matrices rounded by GPTQ (runtime/quant/gptq.h): second moments of what a matrix is multiplied with,
// and its rows rounded to int4 so that the output changes least.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <vector>

#include "runtime/quant/packed_slice.h"

namespace lighter::models {

// A matrix as packed_slice.h has one of its own, in the layout that `form` says.
struct PackedRows {
  SliceEncoding encoding = SliceEncoding::int4;
  PackedMatrix form;
  std::vector<std::byte> bytes;
};

// What a matrix is multiplied with: in the model as it is (exact), and in the one whose earlier matrices are
// rounded already. Sums in fp64, [columns, columns].
struct Moments {
  at::Tensor squares;  // transpose(rounded) rounded
  at::Tensor drift;    // transpose(exact - rounded) rounded
  int64_t tokens = 0;

  Moments() = default;
  Moments(int64_t columns, const at::Device& device);
  // Both [tokens, columns].
  void add(const at::Tensor& exact, const at::Tensor& rounded);
};

// weight [rows, columns], columns a multiple of 128, rows of 16. int4 by GPTQ; where no input was ever other
// than 0 a column counts like the others. Before, what can be foretold of the inputs' drift is made up for
// (as in "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", Li et al. 2025, by least
// squares, the less the fewer tokens there are for the columns). int8 to nearest: moments are not looked at.
// `name` is for errors. Throws CheckpointError for weights that cannot be stored. Uses oneTBB's threads and
// the tensors' device.
PackedRows quantize_matrix(SliceEncoding encoding, const at::Tensor& weight, const Moments& moments,
                           const std::string& name);

// Back to numbers: into `to`, [rows, columns] of a dtype that weights have.
void dequantize_into(const PackedRows& from, const at::Tensor& to);

}  // namespace lighter::models
