// Checks, sizes and launches; the kernels are in quant_slice_kernels.cuh.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "runtime/error.h"
#include "runtime/kernels/quant_slice.h"
#include "runtime/kernels/quant_slice_kernels.cuh"

namespace lighter::kernels {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw DeviceError(std::string("quantized slices: ") + what + ": " + cudaGetErrorString(error));
}

void check_shape(Encoding encoding, QuantSliceShape shape) {
  const bool fits = shape.hidden > 0 && shape.hidden % 128 == 0 && shape.width > 0 &&
                    shape.width % 256 == 0 && shape.hidden * shape.width < int64_t{1} << 31;
  if (fits && (encoding == Encoding::int8 || encoding == Encoding::int4)) return;
  throw ConfigError("a quantized slice of hidden " + std::to_string(shape.hidden) + " and width " +
                    std::to_string(shape.width) +
                    " is not supported: hidden must be a multiple of 128, width one of 256");
}

// Launches so that the kernel may start before the previous one of the stream has ended; every kernel waits
// for that end itself, at the latest before it touches what the previous one wrote.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, int threads, int64_t shared_bytes, void* stream,
            const char* what, const Arguments&... arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes)),
        what);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), what);
}

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&value, attribute, device), "device attribute");
  return value;
}

// The most of `wanted` slices whose hidden values fit into down's shared memory.
template <Encoding E>
int slices_that_fit(int wanted, const Geometry& g, int64_t limit) {
  while (wanted > 0 && shared_bytes<E>(static_cast<int64_t>(wanted) * g.width, g.tokens) > limit) --wanted;
  return wanted;
}

template <Encoding E, int TokenTiles>
void forward(const Slices& slices, const Geometry& g, const QuantizedActivations& x, const HiddenValues& h,
             float* sum, int64_t shared_limit, void* stream) {
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount);
  const int tiles = slices.count * (g.width / row_block);
  launch(gate_up_kernel<E, TokenTiles>, dim3(std::min(tiles, processors)), block_warps * 32,
         shared_bytes<E>(g.hidden, g.tokens), stream, "gate and up", slices, g, x, h);
  const int64_t groups = static_cast<int64_t>(slices.count) * g.tokens * (g.width / Traits<E>::group);
  launch(quantize_kernel<E, float>, dim3(static_cast<unsigned>((groups + 7) / 8)), 256, 0, stream,
         "hidden values", h.values, groups, h.q, h.scales, h.sums);
  // As few launches as the shared memory allows, of about the same size.
  const int fitting = slices_that_fit<E>(slices.count, g, shared_limit);
  const int launches = (slices.count + fitting - 1) / fitting;
  const int size = (slices.count + launches - 1) / launches;
  for (int first = 0; first < slices.count; first += size) {
    const int count = std::min(size, slices.count - first);
    const int team_warps = count <= 8 ? 8 : 16;
    launch(down_kernel<E, TokenTiles>, dim3(std::min(g.hidden / 16, processors)), block_warps * 32,
           shared_bytes<E>(static_cast<int64_t>(count) * g.width, g.tokens), stream, "down", slices, first,
           count, team_warps, g, h, sum);
  }
}

template <Encoding E>
void forward(const Slices& slices, QuantSliceShape shape, int tokens, QuantizedActivations x, void* workspace,
             float* sum, void* stream) {
  const int hidden = static_cast<int>(shape.hidden), width = static_cast<int>(shape.width);
  const int64_t limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  auto fits = [&](int n) { return shared_bytes<E>(std::max(hidden, width), n) <= limit; };
  int most = tokens;
  while (most > 0 && !fits(most)) --most;
  if (most == 0) {
    throw ConfigError("quantized slices of hidden " + std::to_string(hidden) + " and width " +
                      std::to_string(width) + " need " +
                      std::to_string(shared_bytes<E>(std::max(hidden, width), 1)) +
                      " bytes of shared memory a block; this device has " + std::to_string(limit) +
                      ": use narrower slices, another device or dtype bf16");
  }
  for (int done = 0; done < tokens; done += most) {
    const Geometry g{hidden, width, std::min(most, tokens - done)};
    const WorkspaceLayout layout = workspace_layout(E, shape, slices.count, g.tokens);
    auto* const base = static_cast<std::byte*>(workspace);
    const HiddenValues h{
        reinterpret_cast<float*>(base + layout.hidden_values), reinterpret_cast<int8_t*>(base + layout.q),
        reinterpret_cast<float*>(base + layout.scales), reinterpret_cast<float*>(base + layout.sums)};
    if (g.tokens <= 8) {
      forward<E, 1>(slices, g, x, h, sum, limit, stream);
    } else {
      forward<E, 2>(slices, g, x, h, sum, limit, stream);
    }
    const int64_t groups = hidden / Traits<E>::group;
    x.q += static_cast<int64_t>(g.tokens) * hidden;
    x.scales += g.tokens * groups;
    if (E == Encoding::int4) x.sums += g.tokens * groups;
    sum += static_cast<int64_t>(g.tokens) * hidden;
  }
}

template <Encoding E>
void quantize(ActivationType type, int64_t tokens, int64_t hidden, const void* x,
              const QuantizedActivations& out, void* stream) {
  const int64_t groups = tokens * (hidden / Traits<E>::group);
  const dim3 blocks(static_cast<unsigned>((groups + 7) / 8));
  if (type == ActivationType::bf16) {
    launch(quantize_kernel<E, __nv_bfloat16>, blocks, 256, 0, stream, "activations",
           static_cast<const __nv_bfloat16*>(x), groups, out.q, out.scales, out.sums);
  } else {
    launch(quantize_kernel<E, float>, blocks, 256, 0, stream, "activations", static_cast<const float*>(x),
           groups, out.q, out.scales, out.sums);
  }
}

}  // namespace

uint64_t quant_slice_bytes(Encoding encoding, QuantSliceShape shape) {
  check_shape(encoding, shape);
  const uint64_t elements = 3 * static_cast<uint64_t>(shape.hidden) * shape.width;
  return encoding == Encoding::int8 ? elements + elements / 128 * 2 : elements / 2 + elements / 64 * 4;
}

void quantize_activations(Encoding encoding, ActivationType type, int64_t tokens, int64_t hidden,
                          const void* x, const QuantizedActivations& out, void* stream) {
  if (tokens < 0 || hidden <= 0 || hidden % 128 != 0) {
    throw ConfigError("cannot quantize " + std::to_string(tokens) + " tokens of hidden " +
                      std::to_string(hidden) + ": hidden must be a multiple of 128");
  }
  if (tokens == 0) return;
  if (encoding == Encoding::int8) {
    quantize<Encoding::int8>(type, tokens, hidden, x, out, stream);
  } else {
    quantize<Encoding::int4>(type, tokens, hidden, x, out, stream);
  }
}

WorkspaceLayout workspace_layout(Encoding encoding, QuantSliceShape shape, int count, int tokens) {
  check_shape(encoding, shape);
  const uint64_t values = static_cast<uint64_t>(count) * tokens * shape.width;
  const uint64_t scale_bytes = values / group_size(encoding) * sizeof(float);
  auto next = [](uint64_t offset) { return (offset + 255) / 256 * 256; };
  WorkspaceLayout layout;
  layout.q = next(values * sizeof(float));
  layout.scales = next(layout.q + values);
  layout.sums = next(layout.scales + scale_bytes);
  layout.bytes = next(layout.sums + (encoding == Encoding::int4 ? scale_bytes : 0));
  return layout;
}

uint64_t workspace_bytes(Encoding encoding, QuantSliceShape shape, int count, int tokens) {
  return workspace_layout(encoding, shape, count, tokens).bytes;
}

void slices_forward(Encoding encoding, QuantSliceShape shape, const SliceList& slices, int tokens,
                    const QuantizedActivations& x, void* workspace, float* sum, void* stream) {
  check_shape(encoding, shape);
  if (slices.count < 0 || slices.count > max_slices || tokens < 0 || tokens > max_tokens) {
    throw ConfigError(std::to_string(slices.count) + " slices and " + std::to_string(tokens) +
                      " tokens in one call: at most " + std::to_string(max_slices) + " and " +
                      std::to_string(max_tokens) + " are possible; split the call, or dequantize for a GEMM");
  }
  if (slices.count == 0 || tokens == 0) return;
  Slices list{};
  list.count = slices.count;
  list.table = reinterpret_cast<const std::byte* const*>(slices.on_device);
  for (int i = 0; list.table == nullptr && i < slices.count; ++i) {
    list.inline_[i] = static_cast<const std::byte*>(slices.on_host[i]);
  }
  if (encoding == Encoding::int8) {
    forward<Encoding::int8>(list, shape, tokens, x, workspace, sum, stream);
  } else {
    forward<Encoding::int4>(list, shape, tokens, x, workspace, sum, stream);
  }
}

void dequantize_slice(Encoding encoding, QuantSliceShape shape, const void* slice, void* gate_up, void* down,
                      void* stream) {
  check_shape(encoding, shape);
  const Geometry g{static_cast<int>(shape.hidden), static_cast<int>(shape.width), 0};
  const int64_t threads = shape.hidden * shape.width / (encoding == Encoding::int8 ? 8 : 16);
  const dim3 blocks(static_cast<unsigned>((threads + 255) / 256), 3);
  launch(encoding == Encoding::int8 ? dequantize_kernel<Encoding::int8> : dequantize_kernel<Encoding::int4>,
         blocks, 256, 0, stream, "dequantize", static_cast<const std::byte*>(slice), g,
         static_cast<__nv_bfloat16*>(gate_up), static_cast<__nv_bfloat16*>(down));
}

}  // namespace lighter::kernels
