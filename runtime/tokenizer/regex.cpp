#include "runtime/tokenizer/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <array>
#include <limits>
#include <string>

#include "runtime/error.h"
#include "runtime/tokenizer/regex_dialect.h"
#include "runtime/tokenizer/utf8.h"

namespace lighter::tokenizer {
namespace {

std::string message_of(int code) {
  std::array<PCRE2_UCHAR, 256> text{};
  pcre2_get_error_message(code, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

// The state of one search over one text.
class Search {
 public:
  Search(const pcre2_code* code, std::string_view text)
      : code_(code), text_(text), data_(pcre2_match_data_create(1, nullptr)), context_(create_context()) {
    if (data_ == nullptr || context_ == nullptr) {
      pcre2_match_data_free(data_);
      pcre2_match_context_free(context_);
      throw std::bad_alloc();
    }
  }
  Search(const Search&) = delete;
  Search& operator=(const Search&) = delete;
  ~Search() {
    pcre2_match_data_free(data_);
    pcre2_match_context_free(context_);
  }

  // The next match that begins at or after `from`; false if there is none.
  bool find(std::size_t from, std::size_t& begin, std::size_t& end) {
    int result = match(from, PCRE2_NO_UTF_CHECK);
    // The compiled code has a small fixed stack; the interpreter grows its own on the heap.
    if (result == PCRE2_ERROR_JIT_STACKLIMIT) result = match(from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT);
    if (result == PCRE2_ERROR_NOMATCH) return false;
    if (result < 0) {
      throw Error("tokenizer: splitting a text of " + std::to_string(text_.size()) +
                  " bytes failed in the regex engine at byte " + std::to_string(from) + ": " +
                  message_of(result));
    }
    const PCRE2_SIZE* bounds = pcre2_get_ovector_pointer(data_);
    begin = bounds[0];
    end = bounds[1];
    return true;
  }

 private:
  // A split pattern backtracks once per byte at worst, so the default limits (made against hostile patterns)
  // would only cut off long words.
  static pcre2_match_context* create_context() {
    pcre2_match_context* context = pcre2_match_context_create(nullptr);
    if (context != nullptr) pcre2_set_match_limit(context, std::numeric_limits<std::uint32_t>::max());
    return context;
  }
  int match(std::size_t from, std::uint32_t options) {
    return pcre2_match(code_, reinterpret_cast<PCRE2_SPTR>(text_.data()), text_.size(), from, options, data_,
                       context_);
  }

  const pcre2_code* code_;
  std::string_view text_;
  pcre2_match_data* data_;
  pcre2_match_context* context_;
};

}  // namespace

void Regex::Deleter::operator()(pcre2_real_code_8* code) const {
  pcre2_code_free(code);
}

Regex::Regex(std::string_view pattern) {
  const std::string rewritten = to_pcre2(pattern);
  const std::unique_ptr<pcre2_compile_context, decltype(&pcre2_compile_context_free)> context(
      pcre2_compile_context_create(nullptr), pcre2_compile_context_free);
  if (!context) throw std::bad_alloc();
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);  // what "." stops at must not depend on the build
  int error = 0;
  PCRE2_SIZE offset = 0;
  code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(rewritten.data()), rewritten.size(),
                            PCRE2_UTF | PCRE2_UCP, &error, &offset, context.get()));
  if (!code_) {
    throw UnsupportedRegex("the regular expression \"" + std::string(pattern) +
                           "\" does not compile: " + message_of(error));
  }
  // Without JIT support on this machine the interpreter does the same work more slowly.
  pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);
}

std::vector<Span> Regex::cut(std::string_view text) const {
  std::vector<Span> spans;
  if (text.empty()) return spans;
  Search search(code_.get(), text);
  std::size_t from = 0, previous = 0;
  bool matched_before = false;
  while (from <= text.size()) {
    std::size_t begin = 0, end = 0;
    if (!search.find(from, begin, end)) break;
    if (begin == end && matched_before && end == previous) {
      if (from == text.size()) break;
      from += first_char(text.substr(from)).length;
      continue;
    }
    if (begin != previous) spans.push_back({previous, begin, false});
    spans.push_back({begin, end, true});
    from = previous = end;
    matched_before = true;
  }
  if (previous != text.size()) spans.push_back({previous, text.size(), false});
  return spans;
}

bool Regex::matches_anywhere(std::string_view text) const {
  std::size_t begin = 0, end = 0;
  return Search(code_.get(), text).find(0, begin, end);
}

}  // namespace lighter::tokenizer
