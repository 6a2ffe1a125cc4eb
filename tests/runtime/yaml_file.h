// Configurations written to a temporary file, for the tests of runtime/config.
#pragma once

#include <doctest/doctest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "runtime/config/config.h"
#include "runtime/error.h"

namespace lighter::test {

// A folder of its own that goes away with the test; f.yaml is the file in it.
struct YamlFile {
  std::filesystem::path folder, file;

  explicit YamlFile(const std::string& text) {
    std::string name = (std::filesystem::temp_directory_path() / "lighter-config-XXXXXX").string();
    REQUIRE(mkdtemp(name.data()) != nullptr);
    folder = name;
    file = folder / "f.yaml";
    std::ofstream(file) << text;
  }
  YamlFile(const YamlFile&) = delete;
  YamlFile& operator=(const YamlFile&) = delete;
  ~YamlFile() { std::filesystem::remove_all(folder); }
};

inline const std::string kMinimal = "model: {path: m}\nmemory: {gpu_budget: 1GiB, host_budget: 1GiB}\n";
inline const std::string kSynthetic =
    "model: {synthetic: scout}\nmemory: {gpu_budget: 1GiB, host_budget: 1GiB}\n";

inline Config load(const std::string& text, const std::vector<std::string>& overrides = {}) {
  const YamlFile yaml(text);
  return load_config(yaml.file, overrides);
}

// The message of the ConfigError, without the folder of the file; "" if there was none.
inline std::string error_of(const std::string& text, const std::vector<std::string>& overrides = {}) {
  const YamlFile yaml(text);
  try {
    load_config(yaml.file, overrides);
  } catch (const ConfigError& error) {
    const std::string message = error.what(), folder = yaml.folder.string() + "/";
    return message.starts_with(folder) ? message.substr(folder.size()) : message;
  }
  return "";
}

inline std::string begin_of(const std::string& text, size_t length) {
  return text.substr(0, length);
}

}  // namespace lighter::test
