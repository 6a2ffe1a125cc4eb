// What a machine was measured to do, in a file of its own, and the figures that stand in for a machine that
// was not measured. A plain value; thread-safe.
//
// The file is one JSON object with the fields' names below; formats are "dense", "int8" and "int4". Rates are
// GB/s (1e9 bytes) of weights as they are stored. null: the machine has no such thing.
#pragma once

#include <array>
#include <filesystem>
#include <optional>
#include <string>

#include "offload/bound.h"
#include "runtime/quant/packed_slice.h"

namespace lighter::offload {

// One figure for each format of weights.
template <typename Figure>
struct ByFormat {
  std::array<Figure, 3> figures{};

  Figure& operator[](SliceEncoding encoding) { return figures[static_cast<size_t>(encoding)]; }
  const Figure& operator[](SliceEncoding encoding) const { return figures[static_cast<size_t>(encoding)]; }
  bool operator==(const ByFormat&) const = default;
};

// What the CPU's experts and the device reach while both read host memory.
struct SharedRate {
  double cpu = 0;
  double device = 0;
  bool operator==(const SharedRate&) const = default;
};

// Times that no rate explains, in µs. Measured on whole steps, not by `lighter calibrate`.
struct FixedCosts {
  double layer = 0;       // attention's projections and a dense FFN: launches, ramps, norms
  double moe_layer = 0;   // what routing and an MoE layer's further kernels add
  double miss_layer = 0;  // what a layer with missed slices adds: forking, joining, flags
  double attention = 0;   // of a layer, beside reading its keys and values
  double step = 0;        // launching the step and seeing its end
  bool operator==(const FixedCosts&) const = default;
};

struct Calibration {
  static constexpr int kVersion = 3;  // of the figures' meaning; another version's file is not used

  // The machine.
  std::string device, cpu;
  int threads = 0;  // of the CPU's experts
  bool cuda = false;
  std::string date;  // UTC; empty: not measured, but documented figures

  double device_read = 0;           // device memory, plain reading
  double host_read = 0;             // host memory, plain reading by the CPU's threads
  double link = 0;                  // host → device, large copies; on the CPU into the device arena
  std::optional<double> both_read;  // CPU's plain reading and copies at once, together
  std::optional<double> zero_copy;  // a kernel of the device that reads weights in host memory
  ByFormat<double> kernels;         // the device's kernels for one token
  ByFormat<std::optional<double>> cpu_experts;           // the CPU's experts alone
  ByFormat<std::optional<double>> cpu_experts_of_4;      // for four tokens of an expert, not one
  ByFormat<std::optional<SharedRate>> beside_copies;     // one token, and while copies run
  ByFormat<std::optional<SharedRate>> beside_zero_copy;  // and while such a kernel runs
  double kv_read = 0;        // keys and values of one sequence, by the attention of a decode step
  double tensor_tflops = 0;  // large matrix products
  FixedCosts graph, eager;   // of a step that is one CUDA graph; of one operation after the other

  bool measured() const { return !date.empty(); }
  // For people: "measured on DEVICE, 2026-11-24", or where else the figures come from.
  std::string source() const;
  // For bound.h.
  Rates ceilings() const;
  bool operator==(const Calibration&) const = default;
};

// One H100 80GB HBM3 on PCIe 5 with 16 cores; a small machine without a GPU.
Calibration default_calibration(bool cuda);

// Nothing if the file is of another version. Throws ConfigError, "FILE: what is wrong", for a file that
// cannot be read or is not of this form.
std::optional<Calibration> read_calibration(const std::filesystem::path& file);
// Makes the folder if need be. Throws ConfigError.
void write_calibration(const Calibration& calibration, const std::filesystem::path& file);

// What tells a machine from another. device: empty where it is not known.
struct Machine {
  std::string device, cpu;
  int threads = 0;
};
// Why a calibration is not of this machine; empty: it is.
std::string why_other_machine(const Calibration& calibration, const Machine& machine);

// /proc/cpuinfo's model name, or "unknown".
std::string cpu_name();

}  // namespace lighter::offload
