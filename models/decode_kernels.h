// The kernels of a decode graph's step in their order, from the token's id to the next one's.
#pragma once

#include <optional>

#include "models/decode_graph.h"
#include "models/decode_room.h"
#include "models/weights.h"
#include "runtime/kv/kv_cache.h"
#include "runtime/moe/miss_mailbox.h"

namespace lighter::models {

// What a step's kernels work on. All references must outlive it.
struct DecodeKernelsInput {
  const DecodeGraphShape& shape;
  const LoadedWeights& weights;
  const KvCache& kv;
  const DeviceRoom& on_device;
  const HostRoom& on_host;
  int64_t context = 0;                   // keys at most
  bool scheduled = false;                // the experts are told, not chosen
  bool zero_copies = false;              // the GPU reads (some) missed slices from host memory
  const MissMailbox* mailbox = nullptr;  // null: the CPU computes none
  bool guesses = false;                  // the workers are told what the next layer is expected to choose
  bool guesses_told = false;             // which is told too
};

// Enqueues all of them on the stream (a cudaStream_t), once, to be captured. Throws DeviceError.
void enqueue_decode_kernels(const DecodeKernelsInput& input, void* stream);

}  // namespace lighter::models
