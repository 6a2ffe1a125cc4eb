// What an action says when it fails.
#pragma once

#include <string>

#include "runtime/error.h"

namespace lighter::test {

// The message of the error that the action throws; empty: it throws none. Errors of other kinds pass through.
template <typename Expected = Error, typename Action>
std::string message_of(const Action& action) {
  try {
    action();
  } catch (const Expected& error) {
    return error.what();
  }
  return "";
}

}  // namespace lighter::test
