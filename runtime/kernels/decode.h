// CUDA kernels of one decode step: one new token of one sequence, everything between the embedding
// and the next token's id but the attention itself (decode_attention.h). They are made to be captured into a
// graph: what changes from step to step is read from device memory.
//
// Matrices are packed as runtime/quant/packed_slice.h says, or plain bf16 [rows, columns]. The residual
// stream and all sums are fp32. Weights are read ahead, before the kernel that makes their input has ended,
// so weights must be in place before the graph runs.
//
// All functions enqueue on `stream` (a cudaStream_t) of the current device and return at once. They keep no
// state; buffers belong to the caller. Addresses are multiples of 16. Compute capability 9.0 or newer. Throws
// ConfigError for shapes outside the limits, DeviceError if a launch fails.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace lighter {
struct MissResult;  // runtime/moe/miss_mailbox.h
}

namespace lighter::kernels {

enum class WeightFormat { bf16, int8, int4 };

constexpr int kMostDecodeTokens = 1;
constexpr int kMostChosen = 32;  // experts of a token
constexpr int kMostDecodeExperts = 128;

// Null if a decode step of these sizes can be computed here, else why not. columns: of any matrix.
std::string why_not_decodable(WeightFormat format, int64_t columns);

// x * rsqrt(mean(x^2) + eps) * weight. residual: fp32 [tokens, columns]; weight: bf16 [columns].
struct NormedInput {
  const float* residual = nullptr;
  const void* weight = nullptr;
  float eps = 0;
};

// Of a later gate and up: the rows that each of its blocks reads first, one of either matrix for each warp.
struct FirstPairs {
  const std::byte* slices = nullptr;  // null: none
  int64_t slice_bytes = 0, row_bytes = 0;
  int width = 0, rows = 0;  // of a slice; of all slices, in either matrix
  int blocks = 0;
};

// y = matrix * x. One of normed, x and x_bf16 is the input.
struct DecodeLinear {
  WeightFormat format = WeightFormat::bf16;
  int tokens = 1;
  int64_t rows = 0, columns = 0;
  const std::byte *weights = nullptr, *scales = nullptr, *minimums = nullptr;
  NormedInput normed;                  // of columns values
  const float* x = nullptr;            // [tokens, columns]
  const void* x_bf16 = nullptr;        // likewise; only for bf16 weights
  float* out = nullptr;                // [tokens, rows]
  bool add = false;                    // out += y
  unsigned long long* best = nullptr;  // [tokens]: the largest of all yet, its value above its row; or null
  bool after_small = false;            // no two blocks may share a multiprocessor, whoever is there before
  bool late_next = false;              // the next kernel begins when the input is loaded
  bool idle_before = false;            // the kernel before leaves memory idle: more weights are fetched ahead
  const std::byte* next = nullptr;  // of a later kernel, fetched too; without idle_before at this one's end
  int64_t next_bytes = 0;
  FirstPairs first_pairs;  // fetched before this one's input is there
};
void decode_linear(const DecodeLinear& linear, void* stream);

// A slice to compute, in a list in device memory.
struct SliceJob {
  const std::byte* slice = nullptr;  // in device memory, or mapped host memory
  int expert = 0;
  int position = 0;  // among the routed slices of the step: by expert, then slice
};
struct JobList {
  int jobs = 0;
  int groups = 0;  // of columns, all jobs together; only the last job may have fewer than width / group
  int unused[2] = {};
  SliceJob entries[1];  // as many as the list was made for

  static constexpr uint64_t bytes(int entries) {
    return 16 + static_cast<uint64_t>(entries) * sizeof(SliceJob);
  }
};

// When the parts of an MoE layer were done, in ns of the GPU's clock: of their blocks, the last.
struct LayerTimes {
  unsigned long long routed = 0;           // from here on missed slices are read, or come
  unsigned long long device_hidden = 0;    // gate and up of what lies on the device
  unsigned long long host_hidden = 0;      // gate and up of the host list
  unsigned long long host_down_begun = 0;  // the hidden activations are there
  unsigned long long host_down = 0;        // down of the host list
  unsigned long long device_down = 0;      // down of what lies on the device
  unsigned long long cpu = 0;              // the CPU's result was about to be here; or was, if it came last
};

// A step does not wait longer for the CPU's result to begin, or for a value of it that is about to come, or
// for a copy.
constexpr unsigned kWaitLimitMs = 500;

// What the kernels of an MoE layer tell each other, in device memory; all 0 before a step.
struct LayerSignals {
  unsigned lists = 0;   // 1: the routing's lists and weights are there
  unsigned blocks = 0;  // of gate and up that are done with what lies on the device
  unsigned hidden = 0;  // 1: all are
  unsigned cpu = 0;     // 1: the CPU's result is about to be there, or did not come in time
};

enum class RouterScore { sigmoid, softmax_normalised };

// What the device writes for the CPU, in mapped host memory; x etc. are complete when posted is seen to be
// step. The first three may be null, together.
struct MissPostTarget {
  std::int8_t* x = nullptr;   // [tokens, hidden]: the residual times the norm's weight, quantized
  float* x_scales = nullptr;  // [tokens, hidden / group]
  float* factors = nullptr;   // [tokens]: what x is still to be multiplied with to be normed
  int group = 64;             // or 128: values of x with a scale of their own
  int* experts = nullptr;     // [tokens, k]
  float* weights = nullptr;   // [tokens, k]
  unsigned* posted = nullptr;
};

// One block guesses, beside gate and up; of more experts it would take too long.
constexpr int kMostGuessedExperts = 32;

// What the coming MoE layer's router makes of this layer's residual stream, told to the CPU, which is so
// expected to be posted by that layer.
struct RoutingGuess {
  const void* weight = nullptr;  // of that router, bf16 [experts, hidden]; null: nothing is guessed
  const void* norm = nullptr;    // of that layer's input, bf16 [hidden]
  const int* forced = nullptr;   // [tokens, k]: guessed already (negative: not), or null
  int* experts = nullptr;        // mapped host memory, [tokens, k]
  unsigned* posted = nullptr;    // likewise: step when experts are there
};

// Slots in device memory to which a copy engine brings the host list's slices while the kernels run.
struct Arrivals {
  std::byte* slots = nullptr;  // of entry i: slots + i * slot_bytes; null: slices are read where they lie
  int64_t slot_bytes = 0;
  const unsigned* arrived = nullptr;  // of entry i: arrival_tag() of step and layer once it is there
  const unsigned* step = nullptr;
  unsigned* error = nullptr;  // set to 1 + the layer when a slice does not come in time
  int layer = 0;              // of the model, for errors
  int moe_layer = 0, moe_layers = 0;
};

// Never 0 for steps from 1 on.
#ifdef __CUDACC__
__host__ __device__
#endif
    constexpr unsigned
    arrival_tag(unsigned step, int moe_layer, int moe_layers) {
  return step * static_cast<unsigned>(moe_layers) + static_cast<unsigned>(moe_layer);
}

// Chooses the token's experts and sorts the chosen experts' slices by where they are.
struct DecodeRouter {
  int experts = 0, k = 0, slices = 0;  // slices: of an expert
  int64_t hidden = 0;
  RouterScore score = RouterScore::sigmoid;
  const void* weight = nullptr;  // bf16 [experts, hidden]
  const int* forced = nullptr;   // [tokens, k]: chosen already, or null
  NormedInput input;
  const std::byte* const* device_table = nullptr;  // [experts * slices]: null where not resident
  const std::byte* const* host_table = nullptr;    // likewise, mapped host addresses; null: all are resident
  int groups_per_slice = 0;
  // Of 65536: the share of the missed groups that the GPU computes from host memory; the CPU has the others.
  const unsigned* zero_copy_share = nullptr;
  JobList *resident = nullptr, *zero_copy = nullptr;  // zero_copy null: the CPU has all that are missed
  float* logits = nullptr;                            // [experts], scratch
  unsigned* arrived = nullptr;                        // one, 0 before the first launch
  int* chosen = nullptr;                              // [tokens, k], by rank
  float* weights = nullptr;                           // [tokens, experts]: 0 where not chosen
  unsigned char* computed = nullptr;                  // by position: 1 if the GPU computes (a part of) it
  int* positions = nullptr;                           // one: how many routed slices the step has
  Arrivals arrivals;                                  // of zero_copy
  MissPostTarget post;                                // posted null: nothing is posted
  RoutingGuess guess;                                 // only where some slices are missed
  LayerTimes* times = nullptr;                        // or null, here and below: nothing is timed
  const unsigned* step = nullptr;
};

// Missed groups that the GPU reads from host memory; the CPU's executor counts with the same function.
#ifdef __CUDACC__
__host__ __device__
#endif
    constexpr int
    zero_copy_groups(int missed_groups, unsigned share) {
  return static_cast<int>((static_cast<uint64_t>(missed_groups) * share + 32768) >> 16);
}

// out = silu(gate * x) * (up * x) for the fixed slices and then the list's; and, by blocks of their own,
// for those of the host list: missed slices, in mapped host memory or in the slots to which they come.
struct DecodeGateUp {
  WeightFormat format = WeightFormat::int8;
  int tokens = 1;
  int64_t hidden = 0, width = 0;  // width: of a slice
  NormedInput input;
  const std::byte* fixed = nullptr;  // slices that every token passes, one after the other
  int fixed_jobs = 0;
  const JobList* list = nullptr;
  const float* input_weights = nullptr;  // [experts]: scales the input of the lists' jobs, or null
  void* out = nullptr;  // hidden activations [jobs, tokens, width]: fp32, or bf16 for bf16 weights
  const JobList* host_list = nullptr;
  void* host_out = nullptr;
  int host_blocks = 0;
  Arrivals arrivals;  // of the host list
  LayerTimes* times = nullptr;
  const DecodeRouter* router = nullptr;  // routing in the same launch, by blocks of its own
  LayerSignals* signals = nullptr;       // of the layer, with a router or a host list
};
void decode_gate_up(const DecodeGateUp& gate_up, void* stream);
FirstPairs first_pairs(const DecodeGateUp& gate_up);  // of its fixed slices

// fixed: sum over the fixed jobs of down * hidden; routed: of the lists', in their order, each times the
// token's weight if output_weights is not null. Either residual += fixed + routed, or both are kept apart;
// the host list's are kept apart always.
struct DecodeDown {
  WeightFormat format = WeightFormat::int8;
  int tokens = 1;
  int64_t hidden = 0, width = 0;
  const std::byte* fixed = nullptr;
  int fixed_jobs = 0;
  const JobList* list = nullptr;
  int most_list_jobs = 0;                 // of either list
  const float* output_weights = nullptr;  // [tokens, experts]
  int experts = 0;
  const void* hidden_activations = nullptr;  // as gate_up makes them
  const JobList* host_list = nullptr;
  const void* host_activations = nullptr;
  int host_blocks = 0;
  bool host_arrives = false;  // the host list's slices are on the device, at last when gate_up is done
  const LayerSignals* signals = nullptr;  // as above: the lists' weights are then fetched ahead; null: not
  float* residual = nullptr;              // [tokens, hidden]
  float* fixed_sum = nullptr;             // [tokens, hidden]; instead of residual
  float* partials = nullptr;              // [positions, tokens, hidden]; likewise
  LayerTimes* times = nullptr;
};
void decode_down(const DecodeDown& down, void* stream);

// residual += fixed + the sum of the computed partials by position + what the CPU made.
struct DecodeCombine {
  int tokens = 1;
  int64_t hidden = 0;
  const float *fixed_sum = nullptr, *partials = nullptr;
  const unsigned char* computed = nullptr;
  const int* positions = nullptr;
  const MissResult* from_cpu = nullptr;  // [tokens, hidden], mapped host memory, or null
  const unsigned* cpu_ending = nullptr;  // mapped: step when from_cpu will soon be complete
  LayerSignals* signals = nullptr;       // with from_cpu
  const unsigned* step = nullptr;
  unsigned* error = nullptr;  // set to 1 + layer when from_cpu does not come in time
  int layer = 0;
  float* residual = nullptr;
  LayerTimes* times = nullptr;
};
void decode_combine(const DecodeCombine& combine, void* stream);

constexpr unsigned kNotFinite = ~0u;  // as a step's error: the best logit is NaN or infinite

// What a step is told, in mapped host memory, and its copy in device memory, where the kernels read it.
struct StepInput {
  unsigned step = 0;
  unsigned zero_copy_share = 0;
  int tokens[kMostDecodeTokens] = {};
  int positions[kMostDecodeTokens] = {};
};
// As a step's token: the one that the step before has found, whose error is then this one's, too.
constexpr int kFoundToken = -1;
struct DecodeBegin {
  const StepInput* input = nullptr;     // [slots], mapped host memory
  const unsigned* completed = nullptr;  // steps, which decide the slot; one word
  int slots = 1;
  StepInput* state = nullptr;  // device
  int tokens = 1;
  int64_t hidden = 0;
  const void* embedding = nullptr;  // bf16 [vocab, hidden], device or mapped host memory
  float* residual = nullptr;
  const int* tables_from = nullptr;  // [slots, table_entries]: block tables and forced experts, mapped
  int* tables_to = nullptr;          // device
  int table_entries = 0;
  unsigned long long* best = nullptr;  // [tokens], set to 0
  unsigned* error = nullptr;           // set to 0, but see kFoundToken
  LayerTimes* times = nullptr;         // [layers], set to 0
  int layers = 0;
};
void decode_begin(const DecodeBegin& begin, void* stream);

// What a step tells the host: the chosen ids and what went wrong; and beside it the experts of each layer
// and, if they are taken, its times.
struct StepOutput {
  int ids[kMostDecodeTokens] = {};
  unsigned error = 0;
  unsigned step = 0;
};
struct DecodeEnd {
  const unsigned long long* best = nullptr;  // [tokens]
  const unsigned* error = nullptr;
  const StepInput* state = nullptr;
  StepOutput* out = nullptr;      // [slots], mapped host memory
  unsigned* completed = nullptr;  // one more
  int slots = 1;
  int tokens = 1;
  LayerSignals* signals = nullptr;  // [layers], set to 0 for the next step
  int layers = 0;
  const int* chosen_from = nullptr;        // device, [layers, k]
  int* chosen_to = nullptr;                // [slots, chosen], mapped host memory, as is times_to
  int chosen = 0;                          // layers * k
  const LayerTimes* times_from = nullptr;  // [layers], or null
  LayerTimes* times_to = nullptr;          // [slots, layers]
};
void decode_end(const DecodeEnd& end, void* stream);

}  // namespace lighter::kernels
