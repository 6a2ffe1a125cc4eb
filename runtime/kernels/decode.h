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
#include <memory>
#include <string>

namespace lighter::kernels {

enum class WeightFormat { bf16, int8, int4 };

constexpr int kMostDecodeExperts = 128;

// Null if a decode step of these sizes can be computed here, else why not. columns: of any matrix.
std::string why_not_decodable(WeightFormat format, int64_t columns);

// x * rsqrt(mean(x^2) + eps) * weight. residual: fp32 [tokens, columns]; weight: bf16 [columns].
struct NormedInput {
  const float* residual = nullptr;
  const void* weight = nullptr;
  float eps = 0;
};

// y = matrix * x. One of normed and x is the input.
struct DecodeLinear {
  WeightFormat format = WeightFormat::bf16;
  int64_t rows = 0, columns = 0;
  const std::byte *weights = nullptr, *scales = nullptr, *minimums = nullptr;
  NormedInput normed;                  // of columns values
  const float* x = nullptr;            // [columns]
  float* out = nullptr;                // [rows]
  bool add = false;                    // out += y
  unsigned long long* best = nullptr;  // one: the largest by rank, see DecodeEnd; or null
};

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
  unsigned long long routed = 0;           // from here on missed slices are read from host memory
  unsigned long long device_hidden = 0;    // gate and up of what lies on the device
  unsigned long long host_hidden = 0;      // gate and up of the host list
  unsigned long long host_down_begun = 0;  // the hidden activations are there
  unsigned long long host_down = 0;        // down of the host list
  unsigned long long device_down = 0;      // down of what lies on the device
  unsigned long long cpu = 0;              // the CPU's result was seen
};

enum class RouterScore { sigmoid, softmax_normalised };

// What the device writes for the CPU, in mapped host memory; x etc. are complete when posted is seen to be
// step.
struct MissPostTarget {
  float* x = nullptr;        // [hidden], normed
  int* experts = nullptr;    // [k]
  float* weights = nullptr;  // [k]
  unsigned* posted = nullptr;
};

// Chooses the token's experts and sorts the chosen experts' slices by where they are.
struct DecodeRouter {
  int experts = 0, k = 0, slices = 0;  // slices: of an expert
  int64_t hidden = 0;
  RouterScore score = RouterScore::sigmoid;
  const void* weight = nullptr;  // bf16 [experts, hidden]
  const int* forced = nullptr;   // [k]: chosen already, or null
  NormedInput input;
  const std::byte* const* device_table = nullptr;  // [experts * slices]: null where not resident
  const std::byte* const* host_table = nullptr;    // likewise, mapped host addresses; null: all are resident
  int groups_per_slice = 0;
  // Of 65536: the share of the missed groups that the GPU computes from host memory; the CPU has the others.
  const unsigned* zero_copy_share = nullptr;
  JobList *resident = nullptr, *zero_copy = nullptr;  // zero_copy null: the CPU has all that are missed
  float* logits = nullptr;                            // [experts], scratch
  int* chosen = nullptr;                              // [k], by rank
  float* weights = nullptr;                           // [experts]: 0 where not chosen
  MissPostTarget post;                                // posted null: nothing is posted
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

// The experts' part of a layer, or any feed-forward network that is packed in slices:
//   hidden = silu(gate * x) * (up * x), then residual += the fixed slices' down * hidden + the routed ones'
// Some blocks of their own route, and then see to the slices that are read from mapped host memory, while the others
// are busy with those that lie in device memory. Sums have one order: the fixed slices', then the routed ones' by
// position, then what the CPU made.
struct DecodeExperts {
  WeightFormat format = WeightFormat::int8;
  int64_t hidden = 0, width = 0;  // width: of a slice
  NormedInput input;
  const std::byte* fixed = nullptr;  // slices that every token passes, one after the other
  int fixed_jobs = 0;
  float* values = nullptr;  // [fixed_jobs + most_list_jobs, width]: the hidden activations
  bool down = true;         // false: only the hidden activations are made
  float* residual = nullptr;         // [hidden]
  float* sum = nullptr;              // [hidden]: gets the sum instead, where there is nothing routed
  const float* fixed_sum = nullptr;  // [hidden]: made before, in the place of fixed slices, or null

  // Null: nothing is routed, and what follows is not used.
  const DecodeRouter* router = nullptr;  // its lists are computed
  int most_list_jobs = 0;                // of both lists together
  bool weighs_input = false;             // the experts' weights scale their input, else their output
  float* host_values = nullptr;          // [most_list_jobs, width]
  float* partials = nullptr;             // [most_list_jobs, hidden]: the host list's
  const float* from_cpu = nullptr;       // [hidden], mapped host memory, or null: nothing comes from the CPU
  const unsigned* cpu_done = nullptr;    // mapped: the step when from_cpu is complete
  unsigned* late = nullptr;              // counts the layers that had to wait for the CPU alone
  unsigned* error = nullptr;             // set to 1 + layer when cpu_done does not come in time
  int layer = 0;
};

// A step does not wait longer for the CPU.
constexpr unsigned kWaitLimitMs = 500;
constexpr unsigned kNotFinite = ~0u;  // as a step's error: the best logit is NaN or infinite

struct DecodeAttention;

// The work of one step between its begin and its end, one part after the other, as a single launch whose blocks stay
// on their multiprocessors: a part's weights are already coming while the part before is still at work. Not
// thread-safe.
class DecodeProgram {
 public:
  DecodeProgram();
  ~DecodeProgram();
  DecodeProgram(DecodeProgram&&) noexcept;
  DecodeProgram& operator=(DecodeProgram&&) noexcept;

  // Device memory of a program of so many parts.
  static uint64_t bytes(int parts);

  // What they point to must stay. Throws ConfigError for what the kernels cannot compute.
  void add(const DecodeLinear& linear);
  void add(const DecodeExperts& experts);
  void add(const DecodeAttention& attention);

  // After the last part: copies the program into memory [bytes(parts)], which must stay, and waits for that.
  void place(std::byte* memory, void* stream);
  // May be captured.
  void enqueue(void* stream) const;

 private:
  struct Plan;
  std::unique_ptr<Plan> plan_;
};

// What a step is told, in mapped host memory, and its copy in device memory, where the kernels read it.
struct StepInput {
  unsigned step = 0;
  unsigned zero_copy_share = 0;
  int token = 0;
  int position = 0;
};
struct DecodeBegin {
  const StepInput* input = nullptr;  // mapped host memory
  StepInput* state = nullptr;        // device
  int64_t hidden = 0;
  const void* embedding = nullptr;  // bf16 [vocab, hidden], device or mapped host memory
  float* residual = nullptr;
  const int* tables_from = nullptr;  // block tables and forced experts: mapped
  int* tables_to = nullptr;          // device
  int table_entries = 0;
  unsigned long long* best = nullptr;  // set to 0
  unsigned* late = nullptr;            // set to 0
  unsigned* error = nullptr;           // likewise
  LayerTimes* times = nullptr;         // [layers], likewise
  int layers = 0;
};
void decode_begin(const DecodeBegin& begin, void* stream);

// What a step tells the host: the chosen id, how many layers waited for the CPU, and what went wrong; and
// beside it the experts of each layer and, if they are taken, its times.
struct StepOutput {
  int id = 0;
  unsigned late = 0;
  unsigned error = 0;
  unsigned step = 0;
};
struct DecodeEnd {
  const unsigned long long* best = nullptr;  // bits that order as the values do, then the row's complement
  const unsigned *late = nullptr, *error = nullptr;
  const StepInput* state = nullptr;
  StepOutput* out = nullptr;  // mapped host memory
  int layers = 0;
  const int* chosen_from = nullptr;  // device, [layers, k]
  int* chosen_to = nullptr;          // mapped host memory, as is times_to
  int chosen = 0;                    // layers * k
  const LayerTimes* times_from = nullptr;  // [layers], or null
  LayerTimes* times_to = nullptr;
};
void decode_end(const DecodeEnd& end, void* stream);

}  // namespace lighter::kernels
