// tokenizer.json → the tokenizer's parts, one function per top-level field. Stateless.
//
// Each throws CheckpointError, naming the field, for what it does not support: nothing that could change the
// ids is passed over.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/tokenizer/json_document.h"
#include "runtime/tokenizer/json_field.h"
#include "runtime/tokenizer/tokenizer_parts.h"

namespace lighter::tokenizer {

TokenizerParts load_parts(std::string_view json_text, const std::string& source);

// A field that is absent or null gives the empty part (for the decoder: tokens joined by spaces).
Normalizer load_normalizer(const std::optional<JsonField>& field);
PreTokenizer load_pre_tokenizer(const std::optional<JsonField>& field);
std::vector<DecoderStep> load_decoder(const std::optional<JsonField>& field);

Bpe load_model(const JsonField& field, const TokenTables& tables);
AddedVocabulary load_added_tokens(const std::optional<JsonField>& field, const Vocabulary& vocabulary,
                                  const Normalizer& normalizer);

// What is put before and after the ids of a text.
struct Surroundings {
  std::vector<std::int64_t> prefix;
  std::vector<std::int64_t> suffix;
};
Surroundings load_post_processor(const std::optional<JsonField>& field);

// {"String": …} or {"Regex": …}.
Pattern load_pattern(const JsonField& field);

}  // namespace lighter::tokenizer
