// The errors lighter throws. Each message says what happened, the numbers, and what to change.
// runtime/cli maps ConfigError, CheckpointError and CapacityError to exit code 2 (the user can fix
// them) and everything else to 1.
#pragma once

#include <stdexcept>

namespace lighter {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A setting is wrong: unknown key, wrong type, impossible value.
class ConfigError : public Error {
 public:
  using Error::Error;
};

// A model folder is missing a part, or a part is damaged or not supported.
class CheckpointError : public Error {
 public:
  using Error::Error;
};

// Something does not fit into a budget.
class CapacityError : public Error {
 public:
  using Error::Error;
};

// The device or a worker failed while running.
class DeviceError : public Error {
 public:
  using Error::Error;
};

// The user asked to stop (Ctrl-C) during long work.
class Interrupted : public Error {
 public:
  Interrupted() : Error("interrupted") {}
};

}  // namespace lighter
