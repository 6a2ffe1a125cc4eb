// Attention of a decode step: one new token of one sequence over its KV blocks (flash decoding). What changes
// from step to step is read from device memory, so the launch can be captured into a graph.
//
// In fp32 from qkv: RoPE, then the weightless norm of each head, then the temperature; keys and values are
// rounded to bf16 as they go into the cache. The parts of the keys are merged in their order, so the result
// depends on the shapes, the context and the position alone. Position, table and earlier keys are read before
// the stream's kernel before this one has ended: it must not write them, nor start before what writes them
// has ended. See decode.h for streams and errors.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lighter::kernels {

// Up to so many keys there is a faster kernel.
inline constexpr int64_t kFewKeys = 1024;

struct DecodeAttention {
  const float* qkv = nullptr;               // [(heads + 2 * kv_heads) * head_dim]: q, k, v
  const int* position = nullptr;            // one
  void *keys = nullptr, *values = nullptr;  // bf16 [rows, kv_heads, head_dim]: of this layer
  const int* block_table = nullptr;         // row = block_table[at / block] * block + at % block
  int block = 0;
  int64_t window = 0;  // 0: every earlier position is seen, at = position; else those since the last multiple
                       // of window, and at = position % window
  int heads = 0, kv_heads = 0, head_dim = 0;  // head_dim 64 or 128; heads / kv_heads up to 8
  bool rope = false, interleaved = false;
  const float* inverse_frequencies = nullptr;  // [head_dim / 2]
  bool qk_norm = false;
  float eps = 0;
  // Temperature of q: 1 + scale * log1p(floor((position + 1) / floor_scale)); 0: none.
  float temperature_scale = 0, floor_scale = 1;
  int64_t context = 0;        // keys at most
  void* workspace = nullptr;  // decode_attention_workspace_bytes(), 0 before its first use
  float* out = nullptr;       // [heads * head_dim]
};

uint64_t decode_attention_workspace_bytes(int heads, int kv_heads, int head_dim);
// Throws ConfigError for heads that it does not support.
void decode_attention(const DecodeAttention& attention, void* stream);

}  // namespace lighter::kernels
