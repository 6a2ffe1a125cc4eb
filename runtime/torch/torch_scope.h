// libtorch under lighter's rules while it lives: its temporaries stay inside a workspace that counts against
// the device budget, its work goes to the device's compute stream, gradients are off, and its threads are as
// many as configured.
//
// One at a time in a process (libtorch's allocators are global). Tensors may outlive it.
#pragma once

#include <cstdint>
#include <memory>

#include "runtime/device/device.h"

namespace lighter {

class TorchScope {
 public:
  // Takes workspace_bytes from the device budget. threads: 0 leaves libtorch's own choice.
  TorchScope(Device& device, uint64_t workspace_bytes, int threads);
  ~TorchScope();
  TorchScope(const TorchScope&) = delete;
  TorchScope& operator=(const TorchScope&) = delete;

  uint64_t workspace_bytes() const;
  // The most that libtorch's temporaries held at once.
  uint64_t peak_bytes() const;

 private:
  struct Rules;
  std::unique_ptr<Rules> rules_;
};

}  // namespace lighter
