// What NVIDIA's management library says of a GPU: name, driver, energy, how busy. It is looked up when the
// program runs, so that neither a build nor a machine without it misses anything. Thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

namespace lighter::bench {

class Nvml {
 public:
  // cuda_index: as CUDA counts. Null where there is no library, or it does not know the GPU.
  static std::unique_ptr<Nvml> open(int cuda_index);
  ~Nvml();
  Nvml(const Nvml&) = delete;
  Nvml& operator=(const Nvml&) = delete;

  std::optional<std::string> name() const;
  std::optional<std::string> driver() const;
  std::optional<double> energy_j() const;    // since the driver was loaded
  std::optional<double> busy_share() const;  // of the last sampling period, 1/6 s to 1 s

 private:
  struct Library;
  explicit Nvml(std::unique_ptr<Library> library);
  std::unique_ptr<Library> library_;
};

}  // namespace lighter::bench
