#include "runtime/tokenizer/tokenizer.h"

#include <algorithm>
#include <fstream>
#include <utility>

#include "runtime/error.h"
#include "runtime/tokenizer/load_json.h"
#include "runtime/tokenizer/tokenizer_parts.h"
#include "runtime/tokenizer/utf8.h"

namespace lighter {
namespace {

using tokenizer::TokenizerParts;

const tokenizer::AddedToken* added_token(const TokenizerParts& parts, std::int64_t id) {
  const auto added = parts.added.by_id.find(id);
  return added == parts.added.by_id.end() ? nullptr : &added->second;
}

void push_token(const TokenizerParts& parts, std::int64_t id, bool skip_special, tokenizer::DecoderRun& run,
                std::string& out) {
  if (const tokenizer::AddedToken* added = added_token(parts, id)) {
    // The decoder undoes the normalizer, so a normalized token goes in as it was matched.
    if (!(skip_special && added->special)) run.push(added->pattern, out);
  } else if (parts.model.vocabulary().has(id)) {
    run.push(parts.model.vocabulary().text(id), out);
  }
}

std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw CheckpointError(
        path.string() +
        " cannot be opened. The tokenizer is read from tokenizer.json, the Hugging Face form; "
        "a SentencePiece tokenizer.model alone has to be converted first");
  }
  std::string text;
  file.seekg(0, std::ios::end);
  if (const auto size = file.tellg(); size > 0) text.resize(static_cast<std::size_t>(size));
  file.seekg(0);
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (!file) throw CheckpointError(path.string() + " cannot be read");
  return text;
}

}  // namespace

Tokenizer::Tokenizer(std::shared_ptr<const TokenizerParts> parts) : parts_(std::move(parts)) {}

Tokenizer Tokenizer::load(const std::filesystem::path& model_dir) {
  const std::filesystem::path path = model_dir / "tokenizer.json";
  return parse(read_file(path), path.string());
}

Tokenizer Tokenizer::parse(std::string_view json_text, const std::string& source) {
  return Tokenizer(std::make_shared<const TokenizerParts>(tokenizer::load_parts(json_text, source)));
}

std::vector<std::int64_t> Tokenizer::encode(std::string_view text, bool add_special_tokens,
                                            bool parse_special) const {
  const std::string repaired =
      tokenizer::is_valid_utf8(text) ? std::string() : tokenizer::to_valid_utf8(text);
  if (!repaired.empty()) text = repaired;
  std::vector<std::int64_t> ids;
  if (add_special_tokens) ids = parts_->prefix;
  tokenizer::Bpe::Scratch scratch;
  for (const tokenizer::Section& outer : parts_->added.in_text.find(text, parse_special)) {
    if (outer.id >= 0) {
      ids.push_back(outer.id);
      continue;
    }
    const std::string normalized =
        parts_->normalizer.apply(text.substr(outer.begin, outer.end - outer.begin));
    for (const tokenizer::Section& inner : parts_->added.in_normalized_text.find(normalized, parse_special)) {
      if (inner.id >= 0) {
        ids.push_back(inner.id);
        continue;
      }
      const bool at_text_start = outer.begin == 0 && inner.begin == 0;
      std::string section = normalized.substr(inner.begin, inner.end - inner.begin);
      for (const std::string& piece : parts_->pre_tokenizer.pieces(std::move(section), at_text_start)) {
        parts_->model.encode(piece, ids, scratch);
      }
    }
  }
  if (add_special_tokens) ids.insert(ids.end(), parts_->suffix.begin(), parts_->suffix.end());
  return ids;
}

std::string Tokenizer::decode(std::span<const std::int64_t> ids, bool skip_special) const {
  tokenizer::DecoderRun run(parts_->decoder, /*whole_runs=*/true);
  std::string out;
  for (const std::int64_t id : ids) push_token(*parts_, id, skip_special, run, out);
  run.finish(out);
  return out;
}

std::int64_t Tokenizer::vocab_size() const {
  std::int64_t size = parts_->model.vocabulary().id_limit();
  for (const auto& [id, token] : parts_->added.by_id) size = std::max(size, id + 1);
  return size;
}

std::optional<std::int64_t> Tokenizer::token_id(std::string_view content) const {
  if (const auto added = parts_->added.ids.find(std::string(content)); added != parts_->added.ids.end()) {
    return added->second;
  }
  const std::int64_t id = parts_->model.vocabulary().id(content);
  return id < 0 ? std::nullopt : std::optional(id);
}

std::optional<std::string> Tokenizer::token(std::int64_t id) const {
  if (const tokenizer::AddedToken* added = added_token(*parts_, id)) return added->content;
  if (!parts_->model.vocabulary().has(id)) return std::nullopt;
  return std::string(parts_->model.vocabulary().text(id));
}

bool Tokenizer::is_special(std::int64_t id) const {
  const tokenizer::AddedToken* added = added_token(*parts_, id);
  return added != nullptr && added->special;
}

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, bool skip_special)
    : parts_(tokenizer.parts_),
      run_(std::make_unique<tokenizer::DecoderRun>(parts_->decoder, /*whole_runs=*/false)),
      skip_special_(skip_special) {}

StreamDecoder::~StreamDecoder() = default;
StreamDecoder::StreamDecoder(StreamDecoder&&) noexcept = default;
StreamDecoder& StreamDecoder::operator=(StreamDecoder&&) noexcept = default;

std::string StreamDecoder::push(std::int64_t id) {
  std::string out;
  push_token(*parts_, id, skip_special_, *run_, out);
  return out;
}

std::string StreamDecoder::flush() {
  std::string out;
  run_->finish(out);
  return out;
}

}  // namespace lighter
