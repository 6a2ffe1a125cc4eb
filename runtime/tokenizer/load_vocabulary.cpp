// The parts of tokenizer.json that hold tokens: the model and the added tokens.

#include <algorithm>
#include <utility>

#include "runtime/tokenizer/load_json.h"

namespace lighter::tokenizer {
namespace {

// Far above any vocabulary in use; it keeps a damaged id from allocating gigabytes.
constexpr std::int64_t kMaxId = (1 << 24) - 1;

Vocabulary load_vocab(const JsonField& field, const TokenTables& tables) {
  if (!field.json().is_object()) field.fail("must be an object");
  Vocabulary out(tables.vocab.size());
  for (const TokenTables::Entry& entry : tables.vocab) {
    const std::string_view text = tables.text(entry.text);
    const auto fail = [&](const std::string& problem) {
      field.under("." + std::string(text)).fail("the id " + std::to_string(entry.id) + " " + problem);
    };
    if (entry.id < 0 || entry.id > kMaxId) fail("is not from 0 to " + std::to_string(kMaxId));
    if (out.has(entry.id)) fail("belongs to \"" + std::string(out.text(entry.id)) + "\" already");
    if (out.id(text) >= 0) fail("is the token's second; the first was " + std::to_string(out.id(text)));
    out.insert(text, static_cast<std::int32_t>(entry.id));
  }
  return out;
}

MergeTable load_merges(const JsonField& field, const TokenTables& tables, const Vocabulary& vocabulary) {
  if (!field.json().is_array()) field.fail("must be an array");
  MergeTable out(tables.merges.size());
  std::string merged;
  for (std::size_t rank = 0; rank < tables.merges.size(); ++rank) {
    const std::string_view left = tables.text(tables.merges[rank].left);
    const std::string_view right = tables.text(tables.merges[rank].right);
    merged.assign(left).append(right);
    const auto id_of = [&](std::string_view text) {
      const std::int32_t id = vocabulary.id(text);
      if (id < 0) {
        field.under("[" + std::to_string(rank) + "]")
            .fail("\"" + std::string(text) + "\" is not in model.vocab");
      }
      return id;
    };
    out.insert(id_of(left), id_of(right), static_cast<std::int32_t>(rank), id_of(merged));
  }
  return out;
}

AddedToken load_added_token(const JsonField& field) {
  field.only_keys({"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
  AddedToken token;
  token.content = field.at("content").string();
  token.id = field.at("id").integer();
  token.single_word = field.at("single_word").boolean();
  token.lstrip = field.at("lstrip").boolean();
  token.rstrip = field.at("rstrip").boolean();
  token.normalized = field.at("normalized").boolean();
  token.special = field.at("special").boolean();
  return token;
}

}  // namespace

Bpe load_model(const JsonField& field, const TokenTables& tables) {
  if (field.find("type") && field.type() != "BPE") {
    field.at("type").fail("the model \"" + field.type() + "\" is not supported; supported is BPE");
  }
  field.only_keys({"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix",
                   "fuse_unk", "byte_fallback", "ignore_merges", "vocab", "merges"});
  if (const auto dropout = field.find("dropout"); dropout && dropout->json() != 0.0) {
    dropout->fail("dropout makes the ids random and is for training only; set it to null");
  }
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (const auto affix = field.find(key); affix && !affix->string().empty()) {
      affix->fail("is not supported; it must be null or empty");
    }
  }
  Vocabulary vocabulary = load_vocab(field.at("vocab"), tables);
  MergeTable merges = load_merges(field.at("merges"), tables, vocabulary);
  BpeOptions options;
  options.ignore_merges = field.boolean_or("ignore_merges", false);
  options.byte_fallback = field.boolean_or("byte_fallback", false);
  options.fuse_unk = field.boolean_or("fuse_unk", false);
  if (const auto unk = field.find("unk_token")) {
    options.unk_id = vocabulary.id(unk->string());
    if (options.unk_id < 0) unk->fail("\"" + unk->string() + "\" is not in model.vocab");
  }
  return Bpe(std::move(vocabulary), std::move(merges), options);
}

AddedVocabulary load_added_tokens(const std::optional<JsonField>& field, const Vocabulary& vocabulary,
                                  const Normalizer& normalizer) {
  AddedVocabulary out;
  if (!field) return out;
  std::vector<std::string> order;  // contents as they come first
  std::unordered_map<std::string, bool> special;
  std::int64_t largest = -1;
  for (const JsonField& item : field->items()) {
    AddedToken token = load_added_token(item);
    if (token.content.empty()) continue;  // as in the reference
    // The reference derives the id and only warns if the file says another; an embedding row that is not the
    // one the file means is worse than a refusal.
    std::int64_t id = vocabulary.id(token.content);
    if (const auto known = out.ids.find(token.content); known != out.ids.end()) id = known->second;
    if (id < 0) id = largest >= vocabulary.size() ? largest + 1 : vocabulary.size();
    if (id != token.id) {
      item.at("id").fail("the token \"" + token.content + "\" would get the id " + std::to_string(id) +
                         ", but the file says " + std::to_string(token.id) +
                         "; ids with gaps or twice the same are not supported");
    }
    largest = std::max(largest, id);
    token.pattern = token.normalized ? normalizer.apply(token.content) : token.content;
    if (special.emplace(token.content, token.special).second) order.push_back(token.content);
    token.special = special[token.content] = special[token.content] || token.special;
    out.ids[token.content] = id;
    out.by_id[id] = std::move(token);
  }
  // Of equal patterns the first counts, and special tokens come before others.
  for (const bool want_special : {true, false}) {
    for (const std::string& content : order) {
      const AddedToken& token = out.by_id.at(out.ids.at(content));
      if (token.special != want_special) continue;
      (token.normalized ? out.in_normalized_text : out.in_text).add(token);
    }
  }
  return out;
}

}  // namespace lighter::tokenizer
