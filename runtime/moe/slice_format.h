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
#include <span>

#include "runtime/device/device.h"
#include "runtime/dtype.h"
#include "runtime/quant/packed_slice.h"

namespace lighter {

struct SliceShape {
  int64_t hidden = 0;
  int64_t width = 0;
};

// The tokens of a layer, sorted by the expert that they go to: what a format makes of them, once for all
// experts.
struct RoutedInput {
  at::Tensor x;    // [rows, hidden], contiguous
  at::Tensor sum;  // [rows, hidden] fp32, zeros: what the experts make of them
  // A quantized format's own on a GPU: x as int8, its scales, the groups' sums, room for the hidden
  // activations; and room for an expert unpacked, [2 · ffn, hidden] and [hidden, ffn].
  at::Tensor q, scales, sums, workspace;
  at::Tensor gate_up, down;
};

// One expert's tokens in a RoutedInput.
struct RowRange {
  int64_t first = 0;
  int64_t count = 0;
};

class SliceFormat {
 public:
  virtual ~SliceFormat() = default;

  virtual uint64_t slice_bytes() const = 0;

  // x: [rows, hidden] in the model's dtype. experts: their rows. slices: of an expert.
  virtual RoutedInput prepare(Device& device, const at::Tensor& x, std::span<const RowRange> experts,
                              int slices) const = 0;
  // Enqueues work with some slices of one expert, `first` and the following, at these device addresses. They
  // may be overwritten after it. All slices come in their order, in calls of any length; then finish(). Then
  // input.sum has the output for the rows, the same however the calls were cut.
  virtual void accumulate(Device& device, int first, std::span<const std::byte* const> slices,
                          const RoutedInput& input, RowRange rows) const = 0;
  virtual void finish(Device&, const RoutedInput&, RowRange) const {}
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
