// The memory of a decode graph, device and host, and how its parts lie there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "models/decode_graph.h"
#include "runtime/kernels/decode.h"
#include "runtime/moe/miss_mailbox.h"

namespace lighter::models {

kernels::WeightFormat format_of(SliceEncoding encoding);
// Groups of a slice's columns, by which missed slices are shared out.
int groups_per_slice(const DecodeGraphShape& shape);

// How the ints that a step is told lie: block tables of both groups, then scheduled experts, then those that
// are expected.
struct TableLayout {
  int blocks[2] = {};
  int forced_at = 0;
  int guessed_at = 0;
  int entries = 0;

  explicit TableLayout(const DecodeGraphShape& shape);
};

MissMailboxShape mailbox_shape(const DecodeGraphShape& shape);

// Room in one allocation; with no base it only counts.
class Room {
 public:
  explicit Room(std::byte* base) : base_(base) {}
  template <typename T>
  T* take(int64_t count) {
    const uint64_t at = used_;
    used_ += (static_cast<uint64_t>(count) * sizeof(T) + 255) / 256 * 256;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }
  uint64_t used() const { return used_; }

 private:
  std::byte* base_;
  uint64_t used_ = 0;
};

// Pointers into device memory, of one sequence.
struct DeviceRoom {
  float *residual, *qkv, *attended, *logits, *inverse_frequencies;
  std::byte* attention_workspace;
  kernels::StepInput* state;
  int* tables;
  unsigned long long* best;
  unsigned *error, *arrived, *completed;
  kernels::LayerSignals* signals;
  float* router_logits;
  // Hidden activations, as the kernels take them.
  std::byte* fixed[3] = {};  // by format, of networks that every token passes
  std::byte *routed, *from_host;
  kernels::JobList *resident, *zero_copy;
  int *chosen, *positions;
  float *router_weights, *fixed_sum, *partials;
  unsigned char* computed;
  kernels::LayerTimes* times = nullptr;  // of all resident ones nothing is timed
  const std::byte **device_table, **host_table;
  std::byte* slots;        // for slices that are fetched
  unsigned* slot_arrived;  // of each slot

  DeviceRoom(Room& room, const DecodeGraphShape& shape);
};

// Pointers into mapped host memory. Of each of kStepsAtOnce slots: input, output, tables, chosen, times.
struct HostRoom {
  kernels::StepInput* input;
  kernels::StepOutput* output;
  int *tables, *chosen;
  kernels::LayerTimes* times;
  std::byte* mailbox;
  unsigned* tags;  // of layers, for what is fetched

  HostRoom(Room& room, const DecodeGraphShape& shape);
};

template <typename Kind>
uint64_t counted_room(const DecodeGraphShape& shape) {
  Room room(nullptr);
  Kind kind(room, shape);
  return room.used();
}

}  // namespace lighter::models
