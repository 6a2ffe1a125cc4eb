// The few declarations that are needed of nvml.h, whose ABI is stable.
#include "bench/nvml.h"

#include <dlfcn.h>

namespace lighter::bench {

struct Nvml::Library {
  using Handle = void*;
  struct Utilization {
    unsigned gpu = 0, memory = 0;
  };

  void* file = nullptr;
  Handle device = nullptr;
  int (*init)() = nullptr;
  int (*shutdown)() = nullptr;
  int (*by_index)(unsigned, Handle*) = nullptr;
  int (*by_bus_id)(const char*, Handle*) = nullptr;
  int (*get_name)(Handle, char*, unsigned) = nullptr;
  int (*get_driver)(char*, unsigned) = nullptr;
  int (*get_energy)(Handle, unsigned long long*) = nullptr;
  int (*get_utilization)(Handle, Utilization*) = nullptr;
  bool initialised = false;

  ~Library() {
    if (initialised) shutdown();
    if (file != nullptr) dlclose(file);
  }

  template <typename Function>
  bool find(const char* symbol, Function& function) {
    function = reinterpret_cast<Function>(dlsym(file, symbol));
    return function != nullptr;
  }

  bool load() {
    file = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    return file != nullptr && find("nvmlInit_v2", init) && find("nvmlShutdown", shutdown) &&
           find("nvmlDeviceGetHandleByIndex_v2", by_index) &&
           find("nvmlDeviceGetHandleByPciBusId_v2", by_bus_id) && find("nvmlDeviceGetName", get_name) &&
           find("nvmlSystemGetDriverVersion", get_driver) &&
           find("nvmlDeviceGetTotalEnergyConsumption", get_energy) &&
           find("nvmlDeviceGetUtilizationRates", get_utilization);
  }

  // CUDA's order and NVML's differ, and CUDA may show only some GPUs; the bus has one name for both.
  bool choose(int cuda_index) {
    initialised = init() == 0;
    if (!initialised) return false;
    using BusId = int (*)(char*, int, int);
    const auto bus_id = reinterpret_cast<BusId>(dlsym(RTLD_DEFAULT, "cudaDeviceGetPCIBusId"));
    char id[32] = {};
    if (bus_id != nullptr && bus_id(id, sizeof id, cuda_index) == 0) return by_bus_id(id, &device) == 0;
    return by_index(static_cast<unsigned>(cuda_index), &device) == 0;
  }
};

std::unique_ptr<Nvml> Nvml::open(int cuda_index) {
  auto library = std::make_unique<Library>();
  if (!library->load() || !library->choose(cuda_index)) return nullptr;
  return std::unique_ptr<Nvml>(new Nvml(std::move(library)));
}

Nvml::Nvml(std::unique_ptr<Library> library) : library_(std::move(library)) {}
Nvml::~Nvml() = default;

std::optional<std::string> Nvml::name() const {
  char text[96] = {};
  if (library_->get_name(library_->device, text, sizeof text) != 0) return std::nullopt;
  return text;
}

std::optional<std::string> Nvml::driver() const {
  char text[96] = {};
  if (library_->get_driver(text, sizeof text) != 0) return std::nullopt;
  return text;
}

std::optional<double> Nvml::energy_j() const {
  unsigned long long millijoules = 0;
  if (library_->get_energy(library_->device, &millijoules) != 0) return std::nullopt;
  return static_cast<double>(millijoules) / 1000;
}

std::optional<double> Nvml::busy_share() const {
  Library::Utilization utilization;
  if (library_->get_utilization(library_->device, &utilization) != 0) return std::nullopt;
  return static_cast<double>(utilization.gpu) / 100;
}

}  // namespace lighter::bench
