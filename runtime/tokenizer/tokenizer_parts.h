// What a tokenizer.json comes to, in the order in which text passes through it. Immutable once loaded.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "runtime/tokenizer/added_tokens.h"
#include "runtime/tokenizer/bpe.h"
#include "runtime/tokenizer/decoder.h"
#include "runtime/tokenizer/normalizer.h"
#include "runtime/tokenizer/pre_tokenizer.h"

namespace lighter::tokenizer {

struct AddedVocabulary {
  std::unordered_map<std::int64_t, AddedToken> by_id;  // hides the model's token of the same id
  std::unordered_map<std::string, std::int64_t> ids;
  AddedTokenFinder in_text;
  AddedTokenFinder in_normalized_text;
};

struct TokenizerParts {
  AddedVocabulary added;
  Normalizer normalizer;
  PreTokenizer pre_tokenizer;
  Bpe model;
  std::vector<std::int64_t> prefix;  // what the post-processor puts around the ids
  std::vector<std::int64_t> suffix;
  std::vector<DecoderStep> decoder;
};

}  // namespace lighter::tokenizer
