// Turns tokens back into text, token by token, in the steps of tokenizer.json.
//
// The steps are immutable and shared; DecoderRun is the state of one decoding and belongs to one thread.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace lighter::tokenizer {

enum class DecoderKind {
  byte_level,     // characters of GPT-2's table become bytes, and these become text
  byte_fallback,  // runs of <0xNN> become bytes, and these become text
  replace,        // pattern → content, within each token
  metaspace,      // pattern → space; in the first token → nothing if drop_first
  strip,          // takes up to `start` leading and `stop` trailing `content` characters off
  fuse,           // joins all tokens to one
  join,           // puts a space between tokens: what the format means by having no decoder
};

struct DecoderStep {
  DecoderKind kind;
  std::string pattern{};
  std::string content{};
  int start = 0;
  int stop = 0;
  bool drop_first = false;
};

// Whether a step's output is one text delivered in parts, rather than separate tokens.
inline bool fuses(DecoderKind kind) {
  return kind == DecoderKind::byte_level || kind == DecoderKind::byte_fallback || kind == DecoderKind::fuse;
}

// After a step that fuses, only fuse and strip (with stop == 0) may follow; the loader sees to it.
class DecoderRun {
 public:
  // whole_runs: hold a run of byte tokens back until it ends. The reference turns a run that is not valid
  // UTF-8 as a whole into one U+FFFD per byte, which a stream, having already given out the run's valid
  // characters, cannot; there only the bytes from the first bad one on become U+FFFD.
  DecoderRun(const std::vector<DecoderStep>& steps, bool whole_runs);

  // Appends to out whatever text is complete: always whole characters.
  void push(std::string_view token, std::string& out) { push(0, token, out); }
  // Appends what is still held back. The run is then as new.
  void finish(std::string& out);

 private:
  struct State {
    std::string pending;  // bytes that are not yet a character
    bool bad_run = false;
    bool first = true;
    int to_strip = 0;
  };
  void push(std::size_t step, std::string_view token, std::string& out);
  void push_bytes(std::size_t step, std::string_view token, std::string& out);
  void push_fallback(std::size_t step, std::string_view token, std::string& out);
  void push_stripped(std::size_t step, std::string_view token, std::string& out);
  void end_run(std::size_t step, std::string& out);
  bool fused_before(std::size_t step) const;
  void reset();

  const std::vector<DecoderStep>* steps_;
  bool whole_runs_;
  std::vector<State> states_;
};

}  // namespace lighter::tokenizer
