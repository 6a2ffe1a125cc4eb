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

// moments [columns, columns] in fp64 += transpose(x) x, for x [rows, columns].
void add_moments(const at::Tensor& x, at::Tensor& moments);

// weight [rows, columns], columns a multiple of 128, rows of 16. int4 by GPTQ; where no input was ever other
// than 0 a column counts like the others. int8 to nearest: moments are not looked at. `name` is for errors.
// Throws CheckpointError for weights that cannot be stored. Uses oneTBB's threads and the tensors' device.
PackedRows quantize_matrix(SliceEncoding encoding, const at::Tensor& weight, const at::Tensor& moments,
                           const std::string& name);

// Back to numbers: into `to`, [rows, columns] of a dtype that weights have.
void dequantize_into(const PackedRows& from, const at::Tensor& to);

}  // namespace lighter::models
