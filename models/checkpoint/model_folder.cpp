#include "models/checkpoint/model_folder.h"

#include <algorithm>
#include <array>
#include <set>
#include <string_view>
#include <system_error>

#include "models/checkpoint/read_file.h"
#include "models/checkpoint/strict_json.h"
#include "runtime/error.h"

namespace lighter::models {
namespace {

namespace fs = std::filesystem;

constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";
constexpr std::uint64_t kMaxIndexBytes = 100'000'000;
constexpr int kIndexDepth = 3;  // weight_map is at 1; "metadata" may hold anything

bool is_file(const fs::path& path) {
  std::error_code ignored;  // what cannot be looked at is not there
  return fs::is_regular_file(path, ignored);
}

// The folder's files that look like weights, sorted.
std::vector<std::string> weight_like_files(const fs::path& dir) {
  constexpr std::array<std::string_view, 6> extensions = {".safetensors", ".bin", ".gguf",
                                                          ".ggml",        ".pth", ".pt"};
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator entry(dir, error), end; !error && entry != end; entry.increment(error)) {
    const std::string extension = entry->path().extension().string();
    if (std::find(extensions.begin(), extensions.end(), extension) != extensions.end()) {
      names.push_back(entry->path().filename().string());
    }
  }
  if (error) throw CheckpointError("cannot list the folder " + dir.string() + ": " + error.message());
  std::sort(names.begin(), names.end());
  return names;
}

[[noreturn]] void throw_no_weights(const fs::path& dir) {
  const std::vector<std::string> found = weight_like_files(dir);
  std::string message = "no " + std::string(kSingleFile) + " or " + kIndexFile + " in " + dir.string();
  if (found.empty()) throw CheckpointError(message + "; give the folder that holds the model's config.json");

  message += "; it holds only " + found.front();
  if (found.size() > 1) message += " and " + std::to_string(found.size() - 1) + " like it";
  const bool shards = std::any_of(found.begin(), found.end(),
                                  [](const std::string& name) { return name.ends_with(".safetensors"); });
  throw CheckpointError(message + (shards ? "; get the index file too, it says which shard holds what"
                                          : "; only safetensors weights can be read, so get those or convert "
                                            "the model (transformers: save_pretrained)"));
}

// weight_map of the index: {"metadata": {...}, "weight_map": {"tensor": "file"}}.
std::map<std::string, std::string> read_weight_map(const fs::path& path) {
  const ReadFile file(path);
  const std::string what = path.string();
  if (file.bytes() > kMaxIndexBytes) {
    throw CheckpointError(what + " has " + std::to_string(file.bytes()) + " bytes; an index has at most " +
                          std::to_string(kMaxIndexBytes));
  }
  std::string text(file.bytes(), '\0');
  file.read_at(0, text.size(), text.data());

  const nlohmann::json index = parse_strict_json(text, what, kIndexDepth);
  const auto found = index.is_object() ? index.find("weight_map") : index.end();
  if (found == index.end() || !found->is_object() || found->empty()) {
    throw CheckpointError(what + " has no \"weight_map\" from tensors to files; get the file again");
  }
  std::map<std::string, std::string> weight_map;
  for (const auto& [tensor, shard] : found->items()) {
    // A name with a folder in it could point outside the model's folder.
    const fs::path name = shard.is_string() ? fs::path(shard.get<std::string>()) : fs::path();
    if (name.empty() || name != name.filename() || name == "." || name == "..") {
      throw CheckpointError(what + ": tensor " + quote_name(tensor) + " does not name a file of this folder");
    }
    weight_map.emplace(tensor, name.string());
  }
  return weight_map;
}

}  // namespace

ModelFolder inspect_model_folder(const fs::path& dir) {
  std::error_code error;
  const fs::file_status status = fs::status(dir, error);
  if (!fs::exists(status)) throw CheckpointError("there is no model folder " + dir.string());
  if (!fs::is_directory(status)) {
    throw CheckpointError(dir.string() + " is not a folder; give the folder that holds the model");
  }
  if (is_file(dir / kSingleFile)) return {{kSingleFile}, {}};
  if (!is_file(dir / kIndexFile)) throw_no_weights(dir);

  ModelFolder folder;
  folder.weight_map = read_weight_map(dir / kIndexFile);
  std::set<std::string> files;
  for (const auto& [tensor, file] : folder.weight_map) files.insert(file);
  std::string missing;
  std::size_t missing_count = 0;
  for (const std::string& file : files) {
    if (is_file(dir / file)) continue;
    missing += (missing_count++ == 0 ? "" : ", ") + file;
  }
  if (missing_count != 0) {
    throw CheckpointError(std::to_string(missing_count) + " of " + std::to_string(files.size()) +
                          " files that the index of " + dir.string() + " names are missing: " + missing +
                          "; get them into the same folder");
  }
  folder.files.assign(files.begin(), files.end());
  return folder;
}

}  // namespace lighter::models
