#include "runtime/tokenizer/decoder.h"

#include <algorithm>
#include <utility>

#include "runtime/tokenizer/normalizer.h"
#include "runtime/tokenizer/pre_tokenizer.h"
#include "runtime/tokenizer/utf8.h"

namespace lighter::tokenizer {
namespace {

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

// The byte that <0xNN> stands for, or -1. The reference parses NN as Rust parses a number, where "+N" is one.
int fallback_byte(std::string_view token) {
  if (token.size() != 6 || token.substr(0, 3) != "<0x" || token[5] != '>') return -1;
  const int high = token[3] == '+' ? 0 : hex_digit(token[3]);
  const int low = hex_digit(token[4]);
  return high < 0 || low < 0 ? -1 : high * 16 + low;
}

// The bytes that a token's characters stand for, or its own bytes if one of them stands for none.
std::string byte_level_bytes(std::string_view token) {
  std::string bytes;
  for (std::string_view rest = token; !rest.empty();) {
    const Utf8Char c = first_char(rest);
    const int byte = byte_level_byte(c.code_point);
    if (byte < 0) return std::string(token);
    bytes.push_back(static_cast<char>(byte));
    rest.remove_prefix(c.length);
  }
  return bytes;
}

}  // namespace

DecoderRun::DecoderRun(const std::vector<DecoderStep>& steps, bool whole_runs)
    : steps_(&steps), whole_runs_(whole_runs) {
  reset();
}

void DecoderRun::reset() {
  states_.assign(steps_->size(), State{});
  for (std::size_t i = 0; i < states_.size(); ++i) states_[i].to_strip = (*steps_)[i].start;
}

bool DecoderRun::fused_before(std::size_t step) const {
  return std::any_of(steps_->begin(), steps_->begin() + static_cast<std::ptrdiff_t>(step),
                     [](const DecoderStep& s) { return fuses(s.kind); });
}

void DecoderRun::push(std::size_t step, std::string_view token, std::string& out) {
  if (step == steps_->size()) {
    out += token;
    return;
  }
  const DecoderStep& s = (*steps_)[step];
  State& state = states_[step];
  const bool first = std::exchange(state.first, false);
  switch (s.kind) {
    case DecoderKind::byte_level:
      return push_bytes(step, token, out);
    case DecoderKind::byte_fallback:
      return push_fallback(step, token, out);
    case DecoderKind::replace:
      return push(step + 1, replace_all(token, s.pattern, s.content), out);
    case DecoderKind::metaspace:
      return push(step + 1, replace_all(token, s.pattern, first && s.drop_first ? "" : " "), out);
    case DecoderKind::strip:
      return push_stripped(step, token, out);
    case DecoderKind::fuse:
      return push(step + 1, token, out);
    case DecoderKind::join:
      return push(step + 1, (first ? "" : " ") + std::string(token), out);
  }
}

void DecoderRun::push_bytes(std::size_t step, std::string_view token, std::string& out) {
  std::string& pending = states_[step].pending;
  pending += byte_level_bytes(token);
  std::string text;
  std::string_view rest = pending;
  while (!rest.empty()) {
    const Utf8Char c = first_char(rest);
    if (c.status == Utf8Status::incomplete) break;
    text += c.status == Utf8Status::valid ? rest.substr(0, c.length) : kReplacementCharacter;
    rest.remove_prefix(c.length);
  }
  pending.erase(0, pending.size() - rest.size());
  push(step + 1, text, out);
}

void DecoderRun::push_fallback(std::size_t step, std::string_view token, std::string& out) {
  State& state = states_[step];
  const int byte = fallback_byte(token);
  if (byte < 0) {
    end_run(step, out);
    return push(step + 1, token, out);
  }
  state.pending.push_back(static_cast<char>(byte));
  if (whole_runs_) return;
  if (!state.bad_run) {
    const Utf8Char c = first_char(state.pending);
    if (c.status == Utf8Status::incomplete) return;
    state.bad_run = c.status == Utf8Status::invalid;
  }
  const bool bad = state.bad_run;
  end_run(step, out);
  state.bad_run = bad;  // until a token that is no byte ends the run
}

// Gives out the pending bytes: as text if they are valid, else as one U+FFFD each.
void DecoderRun::end_run(std::size_t step, std::string& out) {
  State& state = states_[step];
  const std::string bytes = std::exchange(state.pending, {});
  if (!state.bad_run && is_valid_utf8(bytes)) {
    if (!bytes.empty()) push(step + 1, bytes, out);
  } else {
    for (std::size_t i = 0; i < bytes.size(); ++i) push(step + 1, kReplacementCharacter, out);
  }
  state.bad_run = false;
}

void DecoderRun::push_stripped(std::size_t step, std::string_view token, std::string& out) {
  const DecoderStep& s = (*steps_)[step];
  // A fused text arrives in parts, so what is left to strip is remembered between them.
  const bool fused = fused_before(step);
  int left = fused ? states_[step].to_strip : s.start;
  const auto begins = [&] { return token.substr(0, s.content.size()) == s.content; };
  while (left > 0 && !token.empty()) {
    if (!begins()) {
      left = 0;
      break;
    }
    token.remove_prefix(s.content.size());
    --left;
  }
  if (fused) states_[step].to_strip = left;
  for (int i = 0; i < s.stop && token.size() >= s.content.size(); ++i) {
    if (token.substr(token.size() - s.content.size()) != s.content) break;
    token.remove_suffix(s.content.size());
  }
  push(step + 1, token, out);
}

void DecoderRun::finish(std::string& out) {
  for (std::size_t i = 0; i < steps_->size(); ++i) {
    if ((*steps_)[i].kind == DecoderKind::byte_fallback) end_run(i, out);
    if ((*steps_)[i].kind == DecoderKind::byte_level && !states_[i].pending.empty()) {
      push(i + 1, kReplacementCharacter, out);
    }
  }
  reset();
}

}  // namespace lighter::tokenizer
