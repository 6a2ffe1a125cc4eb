// CUDA kernels for quantized expert slices (int8 in groups of 128, int4 in groups of 64).
//
// A slice of an expert holds gate [width, hidden], up [width, hidden] and down [hidden, width], packed
// without padding, little endian:
//   int8, value = scale * q, q in [-127, 127]:
//     gate q | up q | down q | gate scale | up scale | down scale
//   int4, value = scale * q + minimum, q in [0, 15]:
//     gate q | up q | down q | gate scale | up scale | down scale | gate minimum | up minimum | down minimum
// q: one byte (int8), or 32 bytes for 64 values where byte j holds value j in its low and value j + 32 in its
// high nibble (int4). Scales and minima: fp16, one for each group along a row. hidden % 128 == 0 and
// width % 256 == 0.
//
// Activations are int8 with one fp32 scale a group (the weights' group sizes); dots are exact integers, group
// contributions are added in fp32 in a fixed order. A token's result depends neither on the other tokens of
// the call nor on how the slices are spread over calls.
//
// All functions enqueue on `stream` (a cudaStream_t) of the current device and return at once; they may be
// captured into a graph. They keep no state and are thread-safe; buffers belong to the caller and must
// outlive the enqueued work. Slices may lie in device memory or in pinned host memory; they start at
// multiples of 16 bytes, all other buffers at multiples of 16 too. Needs compute capability 9.0 or newer and
// a library built for it. Throws ConfigError for shapes and counts outside the limits above, DeviceError if a
// launch fails.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lighter::kernels {

enum class Encoding { int8, int4 };

struct QuantSliceShape {
  int64_t hidden = 0;
  int64_t width = 0;
};

constexpr int max_slices = 64;  // of one call to slices_forward
constexpr int max_tokens = 16;  // likewise; more tokens are better served by dequantize_slice and a GEMM

constexpr int64_t group_size(Encoding encoding) {
  return encoding == Encoding::int8 ? 128 : 64;
}

uint64_t quant_slice_bytes(Encoding encoding, QuantSliceShape shape);

enum class ActivationType { bf16, fp32 };

// Device memory. q: [tokens, length]; scales, sums: [tokens, length / group]. sums holds scale * (sum of the
// group's q); int8 does not read it and it may be null there.
struct QuantizedActivations {
  int8_t* q = nullptr;
  float* scales = nullptr;
  float* sums = nullptr;
};

// Quantizes x: [tokens, hidden] once for all experts of a layer: scale = max|x| / 127, q = rint(x / scale),
// and q = 0 where scale is 0. A NaN or infinity in a group makes every result that reads the group NaN.
void quantize_activations(Encoding encoding, ActivationType type, int64_t tokens, int64_t hidden,
                          const void* x, const QuantizedActivations& out, void* stream);

// The slices of one expert, count of them. Give one of the two: on_host is an array in host memory that is
// copied into the launch (and into a captured graph); on_device is one that the device reads when the kernels
// run, so that a graph can be replayed with other slices. A null entry is left out.
struct SliceList {
  const void* const* on_host = nullptr;
  const void* const* on_device = nullptr;
  int count = 0;
};

// What slices_forward keeps between its kernels, as offsets in bytes into its workspace.
struct WorkspaceLayout {
  uint64_t hidden_values = 0;  // fp32 [count, tokens, width]: silu(gate · x) * (up · x)
  uint64_t q = 0;              // int8 [count, tokens, width]: the same, quantized
  uint64_t scales = 0;         // fp32 [count, tokens, width / group]
  uint64_t sums = 0;           // fp32 [count, tokens, width / group], int4 only
  uint64_t bytes = 0;
};
WorkspaceLayout workspace_layout(Encoding encoding, QuantSliceShape shape, int count, int tokens);

// Enough for every call with at most this many slices and tokens. A workspace needs no preparation; it may
// serve any calls, one after the other on one stream.
uint64_t workspace_bytes(Encoding encoding, QuantSliceShape shape, int count, int tokens);

// sum[tokens, hidden] += each slice's output for the tokens, slice by slice in the order of the list (fp32).
// x: what quantize_activations made, 1 to 16 tokens. The slices must be complete when the work enqueued on
// the stream before this call is done.
void slices_forward(Encoding encoding, QuantSliceShape shape, const SliceList& slices, int tokens,
                    const QuantizedActivations& x, void* workspace, float* sum, void* stream);

// gate_up: bf16 [2 * width, hidden], down: bf16 [hidden, width], rounded to nearest even.
void dequantize_slice(Encoding encoding, QuantSliceShape shape, const void* slice, void* gate_up, void* down,
                      void* stream);

}  // namespace lighter::kernels
