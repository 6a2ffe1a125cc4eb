#include "runtime/cli/text_windows.h"

#include <algorithm>
#include <fstream>
#include <iterator>

#include "runtime/error.h"

namespace lighter::cli {
namespace {

std::string read_text(const std::filesystem::path& file) {
  const auto refuse = [&] { return ConfigError("--text " + file.string() + ": the file cannot be read"); };
  if (!std::filesystem::is_regular_file(file)) throw refuse();
  std::ifstream in(file, std::ios::binary);
  std::string text(std::istreambuf_iterator<char>(in), {});
  if (!in) throw refuse();
  return text;
}

// What the post-processor puts before a text, if it is a token.
std::optional<int64_t> begin_of_text(const Tokenizer& tokenizer) {
  const auto plain = tokenizer.encode("a", false);
  const auto processed = tokenizer.encode("a", true);
  if (processed.size() == plain.size() || processed.front() == plain.front()) return std::nullopt;
  return processed.front();
}

}  // namespace

TextWindows read_text_windows(const std::filesystem::path& file, const Tokenizer& tokenizer, int64_t context,
                              std::optional<int64_t> limit) {
  if (context < 2) {
    throw ConfigError("memory.context is " + std::to_string(context) + "; a window of text needs at least 2");
  }
  const std::string text = read_text(file);
  TextWindows result;
  result.bytes = static_cast<int64_t>(text.size());
  auto ids = tokenizer.encode(text, false);
  if (limit && *limit < static_cast<int64_t>(ids.size())) {
    ids.resize(*limit);
    result.bytes = static_cast<int64_t>(tokenizer.decode(ids, false).size());
  }
  const auto begin = begin_of_text(tokenizer);
  const auto length = static_cast<std::ptrdiff_t>(context - 1);
  for (auto first = ids.begin(); first != ids.end();) {
    const auto last = first + std::min(length, ids.end() - first);
    TextWindow window;
    if (begin) window.inputs.push_back(*begin);
    window.inputs.insert(window.inputs.end(), first, last - 1);
    window.targets.assign(begin ? first : first + 1, last);
    result.tokens += static_cast<int64_t>(window.targets.size());
    if (!window.targets.empty()) result.windows.push_back(std::move(window));
    first = last;
  }
  if (result.tokens == 0)
    throw ConfigError("--text " + file.string() + ": there are no tokens to score in it");
  return result;
}

void check_ids(const std::vector<int64_t>& ids, int64_t vocab) {
  const int64_t most = *std::max_element(ids.begin(), ids.end());
  if (most < vocab) return;
  throw ConfigError("the text has token " + std::to_string(most) + ", but the model's vocabulary is " +
                    std::to_string(vocab) + "; tokenizer.json belongs to another model");
}

TextWindows load_text_windows(const std::filesystem::path& file, const Config& config,
                              std::optional<int64_t> limit) {
  if (config.model.is_synthetic()) {
    throw ConfigError(
        "--text needs a tokenizer, and synthetic weights have none; set model.path to a model's folder");
  }
  return read_text_windows(file, Tokenizer::load(config.model.path), config.memory.context, limit);
}

}  // namespace lighter::cli
