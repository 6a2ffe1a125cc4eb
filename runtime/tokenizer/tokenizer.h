// Text to token ids and back, as a Hugging Face tokenizer.json says: byte-level BPE (Llama 3 and 4) and BPE
// with byte fallback (Llama 2, Mixtral). Ids and text equal those of the `tokenizers` package.
//
// Tokenizer is immutable and thread-safe, and cheap to copy (the vocabulary is shared). A StreamDecoder
// belongs to one thread and may outlive the Tokenizer it was made from.
//
// What is not supported (other models, normalizers such as NFC, …) is refused at load with a CheckpointError
// that names the field. Only `truncation` and `padding` are read over: they shape batches for training, and
// `transformers` switches them off for a plain call, too. tokenizer_config.json is not needed: what it says
// about special tokens is already in tokenizer.json.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace lighter {

namespace tokenizer {
struct TokenizerParts;
class DecoderRun;
}  // namespace tokenizer

class Tokenizer {
 public:
  // Reads model_dir/tokenizer.json. Throws CheckpointError if it is missing, damaged or not supported.
  static Tokenizer load(const std::filesystem::path& model_dir);

  // The same from the file's text; source is what error messages begin with.
  static Tokenizer parse(std::string_view json_text, const std::string& source);

  // The ids of text. Invalid UTF-8 is read as U+FFFD, one for each maximal invalid part.
  // add_special_tokens: put what the post-processor adds around them (BOS, usually).
  // parse_special: read special tokens in the text as such; false reads them as plain characters, which is
  // what text from a stranger needs. Added tokens that are not special are found in either case.
  std::vector<std::int64_t> encode(std::string_view text, bool add_special_tokens,
                                   bool parse_special = true) const;

  // Ids that the vocabulary does not have give no text (models pad their vocabulary).
  std::string decode(std::span<const std::int64_t> ids, bool skip_special) const;

  // One more than the largest id, added tokens included. The model's embedding may have more rows.
  std::int64_t vocab_size() const;

  std::optional<std::int64_t> token_id(std::string_view content) const;
  // The token as it stands in the vocabulary (byte-level tokens in GPT-2's alphabet).
  std::optional<std::string> token(std::int64_t id) const;
  bool is_special(std::int64_t id) const;

 private:
  friend class StreamDecoder;
  explicit Tokenizer(std::shared_ptr<const tokenizer::TokenizerParts> parts);

  std::shared_ptr<const tokenizer::TokenizerParts> parts_;
};

// Text as the ids come, for streaming. What the pushes and the flush return is, joined, the text that
// decode() gives for the same ids. The one exception: where byte-fallback tokens do not form valid UTF-8,
// decode() (as the reference) turns the whole run of them into U+FFFD, and the stream has then given out the
// run's characters before the bad byte already.
class StreamDecoder {
 public:
  StreamDecoder(const Tokenizer& tokenizer, bool skip_special);
  ~StreamDecoder();
  StreamDecoder(StreamDecoder&&) noexcept;
  StreamDecoder& operator=(StreamDecoder&&) noexcept;

  // The text that id completes: whole characters only, so it may be empty.
  std::string push(std::int64_t id);

  // What was held back: U+FFFD for bytes that never became a character. The decoder then starts anew.
  std::string flush();

 private:
  std::shared_ptr<const tokenizer::TokenizerParts> parts_;
  std::unique_ptr<tokenizer::DecoderRun> run_;
  bool skip_special_;
};

}  // namespace lighter
