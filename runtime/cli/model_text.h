// The text side of a model: its tokenizer, what ends a text, and prompts. Loaded and checked before the weights, so
// that a mistake in the prompt does not cost a load.
#pragma once

#include <optional>
#include <set>
#include <vector>

#include "runtime/cli/commands.h"
#include "runtime/cli/prepared_model.h"
#include "runtime/config/config.h"
#include "runtime/engine/generator.h"
#include "runtime/tokenizer/tokenizer.h"

namespace lighter::cli {

struct ModelText {
  std::optional<Tokenizer> tokenizer;  // none for synthetic weights, and where the folder has no tokenizer.json
  std::set<int64_t> stop_tokens;       // generation_config.json's eos_token_id, else config.json's

  const Tokenizer* tokenizer_or_null() const { return tokenizer ? &*tokenizer : nullptr; }
};

// Throws CheckpointError for a damaged file.
ModelText load_text(const ModelConfig& config);

// What the configuration and the command line ask for, checked against the model. max_tokens: -1 takes the
// configuration's. Throws ConfigError.
GenerateRequest make_request(const Config& config, const PreparedModel& model, const ModelText& text,
                             const PromptOptions& prompt, long long max_tokens);

}  // namespace lighter::cli
