// A text file cut into windows that fill a model's context, for perplexity and for routing traces.
//
// The file is tokenised whole, without what the tokenizer's post-processor adds. Each window is as many
// tokens as the context holds beside a begin-of-text token, which comes before them; the last one may be
// shorter, and every token is scored. Where the post-processor adds no such token, a window begins with its
// own first one, which is then not scored.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <vector>

#include "runtime/config/config.h"
#include "runtime/tokenizer/tokenizer.h"

namespace lighter::cli {

struct TextWindow {
  std::vector<int64_t> inputs;
  std::vector<int64_t> targets;  // targets[i] is what follows inputs[i]
};

struct TextWindows {
  std::vector<TextWindow> windows;
  int64_t tokens = 0;  // that are scored, in all
  int64_t bytes = 0;   // of the text that they are
};

// limit: of the text's tokens, at most so many from its beginning. Throws ConfigError for a file that cannot
// be read or holds nothing to score.
TextWindows read_text_windows(const std::filesystem::path& file, const Tokenizer& tokenizer, int64_t context,
                              std::optional<int64_t> limit);

// Throws ConfigError for a token outside the model's vocabulary.
void check_ids(const std::vector<int64_t>& ids, int64_t vocab);

// With the tokenizer of the configured model, before the model itself is loaded.
TextWindows load_text_windows(const std::filesystem::path& file, const Config& config,
                              std::optional<int64_t> limit);

}  // namespace lighter::cli
