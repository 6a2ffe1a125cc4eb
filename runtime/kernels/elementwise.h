// CUDA: what lies between the large products of a step of many tokens, each in one pass over memory, in bf16
// with the rounding of the same operations done one after another.
//
// All enqueue on `stream` (a cudaStream_t) and return at once; no state; thread-safe; buffers belong to the
// caller and start at multiples of 16 bytes. Throw ConfigError for shapes that they do not support,
// DeviceError if a launch fails.
#pragma once

#include <cstdint>

namespace lighter::kernels {

// out [rows, width] = x / sqrt(mean(x²) + eps), rounded, times weight [width]. width is a multiple of 8.
void rms_norm(const void* x, const void* weight, float eps, int64_t rows, int64_t width, void* out,
              void* stream);

// out [rows, width] = silu(gate), rounded, times up; gate_up: [rows, 2 * width], gates first. width is a
// multiple of 8.
void silu_times(const void* gate_up, int64_t rows, int64_t width, void* out, void* stream);

// Queries, keys and values of new tokens, as attention wants them: RoPE, then the weightless norm of each
// head, then the temperature of the queries, each rounded; values as they are.
struct QkvStep {
  const void* qkv = nullptr;  // [tokens, heads + 2 * kv_heads, head_dim]
  int64_t tokens = 0;
  int heads = 0, kv_heads = 0, head_dim = 0;
  bool rope = false, interleaved = false;
  const float *cos = nullptr, *sin = nullptr;  // [tokens, head_dim / 2]
  bool qk_norm = false;
  float eps = 0;
  const float* temperature = nullptr;       // [tokens] or null
  const int64_t* rows = nullptr;            // [tokens]: where keys and values go
  void *keys = nullptr, *values = nullptr;  // [.., kv_heads, head_dim]
  void* q = nullptr;                        // [tokens, heads, head_dim]
};
bool qkv_step_supports(int head_dim);  // 16, 32, 64, 128 and 256
void qkv_step(const QkvStep& step, void* stream);

}  // namespace lighter::kernels
