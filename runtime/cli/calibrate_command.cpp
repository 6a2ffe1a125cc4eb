#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>

#include "offload/calibrate.h"
#include "runtime/cli/calibration_file.h"
#include "runtime/cli/commands.h"
#include "runtime/cli/console.h"
#include "runtime/cli/model_config.h"
#include "runtime/cli/prepared_model.h"
#include "runtime/cli/torch_rates.h"
#include "runtime/device/host_memory.h"
#include "runtime/error.h"

namespace lighter::cli {
namespace {

void print_table(const offload::Calibration& c) {
  const auto row = [](const char* what, std::optional<double> rate, const char* unit = "GB/s") {
    if (rate) std::printf("  %-52s %8.1f %s\n", what, *rate, unit);
  };
  const auto shared = [](const char* what, const std::optional<offload::SharedRate>& rate) {
    if (rate) std::printf("  %-52s %8.1f + %.1f GB/s\n", what, rate->cpu, rate->device);
  };
  std::printf("%s; %s, %d threads\n\n", c.device.c_str(), c.cpu.c_str(), c.threads);
  row("device memory, plain reading", c.device_read);
  row("host memory, plain reading by the CPU", c.host_read);
  row("copies, host to device", c.link);
  row("the two at once", c.both_read);
  row("a kernel that reads host memory", c.zero_copy);
  row("linear layer, one token, unquantized", c.kernels[SliceEncoding::dense]);
  row("linear layer, one token, int8", c.kernels[SliceEncoding::int8]);
  row("linear layer, one token, int4", c.kernels[SliceEncoding::int4]);
  row("the CPU's experts, int8", c.cpu_experts[SliceEncoding::int8]);
  row("the CPU's experts, int4", c.cpu_experts[SliceEncoding::int4]);
  row("the CPU's experts, int8, 4 tokens of each", c.cpu_experts_of_4[SliceEncoding::int8]);
  row("the CPU's experts, int4, 4 tokens of each", c.cpu_experts_of_4[SliceEncoding::int4]);
  shared("the CPU's experts + copies, int8", c.beside_copies[SliceEncoding::int8]);
  shared("the CPU's experts + copies, int4", c.beside_copies[SliceEncoding::int4]);
  shared("the CPU's experts + that kernel, int8", c.beside_zero_copy[SliceEncoding::int8]);
  shared("the CPU's experts + that kernel, int4", c.beside_zero_copy[SliceEncoding::int4]);
  if (c.tensor_tflops >= 1) {
    row("large matrix products", c.tensor_tflops, "TFLOP/s");
  } else {
    row("large matrix products", 1000 * c.tensor_tflops, "GFLOP/s");
  }
}

}  // namespace

int calibrate_command(const CalibrateOptions& options) {
  const Config config = load_model_config(options.common.config, options.common.overrides);
  const int threads = prepare(config).threads;
  const bool cuda = config.device.kind == DeviceConfig::Kind::cuda;
  constexpr uint64_t kDevice = std::max(offload::kCalibrationDeviceBytes, kTorchRatesBytes);
  const uint64_t host =
      offload::calibration_host_bytes(cuda, config.memory.host_budget_bytes, machine_memory_bytes());
  const auto device =
      cuda ? make_cuda_device(config.device.index, kDevice, std::max(host, config.memory.host_budget_bytes))
           : make_cpu_device(kDevice, host);
  const std::filesystem::path file =
      options.out.empty() ? calibration_path(device->name()) : std::filesystem::path(options.out);

  std::string latest;
  const Progress progress = [&](const std::string& what, uint64_t, uint64_t) {
    if (interrupted()) throw Interrupted();
    if (std::exchange(latest, what) != what) std::fprintf(stderr, "calibrating: %s\n", what.c_str());
  };
  offload::Calibration calibration = offload::calibrate(*device, threads, host, progress);
  progress("matrix products", 0, 0);
  const TorchRates torch = measure_torch_rates(*device, config.model.dtype, threads);
  calibration.tensor_tflops = torch.tensor_tflops;
  if (!cuda) calibration.kernels[SliceEncoding::dense] = torch.dense_gb_per_s;

  offload::write_calibration(calibration, file);
  if (options.common.json) {
    std::ifstream written(file);
    std::printf("%s", std::string(std::istreambuf_iterator<char>(written), {}).c_str());
  } else {
    print_table(calibration);
  }
  std::fprintf(stderr, "written to %s\n", file.c_str());
  return 0;
}

}  // namespace lighter::cli
