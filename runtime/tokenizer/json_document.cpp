#include "runtime/tokenizer/json_document.h"

#include <utility>

#include "runtime/error.h"

namespace lighter::tokenizer {
namespace {

using nlohmann::json;

constexpr std::size_t kMaxDepth = 64;

// Called by the parser for each event. Outside the tables it builds the document:
//   Rest → (model.vocab opens) → Vocab → Rest
//   Rest → (model.merges opens) → Merges ⇄ Pair; Merges → Rest
class Builder : public nlohmann::json_sax<json> {
 public:
  Builder(JsonDocument& out, const std::string& source) : out_(out), source_(source) {}

  bool null() override { return value(nullptr); }
  bool boolean(bool v) override { return value(v); }
  bool number_float(number_float_t v, const string_t&) override { return value(v); }
  bool binary(binary_t& v) override { return value(v); }

  bool number_integer(number_integer_t v) override {
    if (state_ != State::vocab) return value(v);
    out_.tables.vocab.push_back({token_, v});
    return true;
  }
  bool number_unsigned(number_unsigned_t v) override {
    // What does not fit becomes negative, which no id is.
    return state_ == State::vocab ? number_integer(static_cast<number_integer_t>(v)) : value(v);
  }

  bool string(string_t& v) override {
    if (state_ == State::merges) return merge_line(v);
    if (state_ != State::pair) return value(std::move(v));
    if (++halves_ == 1) left_ = out_.tables.add(v);
    if (halves_ == 2) out_.tables.merges.push_back({left_, out_.tables.add(v)});
    return true;
  }

  bool key(string_t& v) override {
    if (state_ == State::vocab) token_ = out_.tables.add(v);
    key_ = std::move(v);
    return true;
  }

  bool start_object(std::size_t) override {
    if (state_ != State::rest) fail_entry();
    if (stack_.size() == 1) in_model_ = key_ == "model";
    if (stack_.size() == 2 && in_model_ && key_ == "vocab") state_ = State::vocab;
    return open(json::object());
  }
  bool start_array(std::size_t) override {
    if (state_ == State::merges) {
      state_ = State::pair;
      halves_ = 0;
      return true;
    }
    if (state_ != State::rest) fail_entry();
    if (stack_.size() == 2 && in_model_ && key_ == "merges") state_ = State::merges;
    return open(json::array());
  }
  bool end_object() override {
    state_ = State::rest;
    stack_.pop_back();
    return true;
  }
  bool end_array() override {
    if (state_ == State::pair) {
      if (halves_ != 2) {
        if (halves_ > 2) out_.tables.merges.pop_back();
        fail_entry();
      }
      state_ = State::merges;
      return true;
    }
    return end_object();
  }

  bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception& error) override {
    throw CheckpointError(source_ + ": is not valid JSON: " + error.what());
  }

 private:
  enum class State { rest, vocab, merges, pair };

  bool merge_line(const std::string& line) {
    // Files made from a merges.txt may still hold its first line.
    if (line.rfind("#version", 0) == 0) return true;
    const std::size_t space = line.find(' ');
    if (space == std::string::npos || line.find(' ', space + 1) != std::string::npos) fail_entry();
    const std::string_view text = line;
    const TokenTables::Text left = out_.tables.add(text.substr(0, space));
    out_.tables.merges.push_back({left, out_.tables.add(text.substr(space + 1))});
    return true;
  }

  json& put(json v) {
    if (stack_.empty()) return out_.rest = std::move(v);
    json& parent = *stack_.back();
    if (parent.is_object()) return parent[key_] = std::move(v);
    parent.push_back(std::move(v));
    return parent.back();
  }
  bool value(json v) {
    if (state_ != State::rest) fail_entry();
    put(std::move(v));
    return true;
  }
  bool open(json container) {
    if (stack_.size() == kMaxDepth) {
      throw CheckpointError(source_ + ": nests deeper than " + std::to_string(kMaxDepth) + " levels");
    }
    stack_.push_back(&put(std::move(container)));
    return true;
  }

  [[noreturn]] void fail_entry() const {
    const TokenTables& tables = out_.tables;
    if (state_ == State::vocab) {
      throw CheckpointError(source_ + ": field model.vocab." + std::string(tables.text(token_)) +
                            ": must be an id, which is an integer");
    }
    throw CheckpointError(source_ + ": field model.merges[" + std::to_string(tables.merges.size()) +
                          "]: must be \"left right\" or [\"left\", \"right\"]");
  }

  JsonDocument& out_;
  const std::string& source_;
  State state_ = State::rest;
  std::vector<json*> stack_;  // the open containers
  std::string key_;
  bool in_model_ = false;
  TokenTables::Text token_{};
  TokenTables::Text left_{};
  int halves_ = 0;
};

}  // namespace

JsonDocument parse_document(std::string_view text, const std::string& source) {
  JsonDocument out;
  Builder builder(out, source);
  json::sax_parse(text, &builder);
  return out;
}

}  // namespace lighter::tokenizer
