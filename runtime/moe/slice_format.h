// How a slice's weights lie in memory, and the kernel that computes with them: the one layout serves disk,
// host, DMA and device. Other formats (quantized ones) are further implementations.
//
// A slice covers `width` of an expert's FFN rows. Logically it holds gate [width, hidden], up [width, hidden]
// and down [hidden, width], and adds down · (silu(gate · x) * (up · x)) to the expert's output.
// Immutable; thread-safe.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <memory>

#include "runtime/device/device.h"
#include "runtime/dtype.h"
#include "runtime/quant/packed_slice.h"

namespace lighter {

struct SliceShape {
  int64_t hidden = 0;
  int64_t width = 0;
};

// What a format makes of the tokens of one expert, once for all of its slices.
struct ExpertInput {
  at::Tensor x;  // [tokens, hidden] in the model's dtype, contiguous
  // A quantized format's own: x as int8, its scales, the groups' sums, room for the hidden activations.
  at::Tensor q, scales, sums, workspace;
};

class SliceFormat {
 public:
  virtual ~SliceFormat() = default;

  virtual uint64_t slice_bytes() const = 0;

  // x: [tokens, hidden] in the model's dtype.
  virtual ExpertInput prepare(Device& device, const at::Tensor& x) const = 0;
  // Enqueues sum += this slice's output for the input. slice: device address of a packed slice.
  // sum: [tokens, hidden] fp32, contiguous.
  virtual void accumulate(Device& device, const std::byte* slice, const ExpertInput& input,
                          at::Tensor& sum) const = 0;
};

// gate [width, hidden], up [width, hidden], down [hidden, width], row by row, without padding.
uint64_t dense_slice_bytes(SliceShape shape, DType dtype);
std::unique_ptr<SliceFormat> make_dense_format(SliceShape shape, DType dtype);

// int8 or int4 (runtime/quant/packed_slice.h), with activations quantized to int8. Throws ConfigError for
// shapes that do not fit the groups.
std::unique_ptr<SliceFormat> make_quantized_format(SliceShape shape, SliceEncoding encoding);

uint64_t slice_bytes(SliceShape shape, SliceEncoding encoding, DType dtype);

// FFN rows to a slice when the configuration leaves it open: about 8 MiB, so that PCIe runs at its full rate,
// 256 or a multiple where the expert's width allows, and, unless quantized, at least 4 slices an expert.
int64_t default_slice_width(int64_t hidden, int64_t expert_ffn, SliceEncoding encoding, DType dtype);

}  // namespace lighter
