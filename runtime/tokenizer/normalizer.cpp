#include "runtime/tokenizer/normalizer.h"

namespace lighter::tokenizer {

std::vector<Span> cut(std::string_view text, const Pattern& pattern) {
  if (const Regex* regex = std::get_if<Regex>(&pattern)) return regex->cut(text);
  const std::string& literal = std::get<std::string>(pattern);
  std::vector<Span> spans;
  std::size_t from = 0;
  while (from < text.size()) {
    const std::size_t found = text.find(literal, from);
    const std::size_t begin = found == std::string_view::npos ? text.size() : found;
    if (begin > from) spans.push_back({from, begin, false});
    if (found == std::string_view::npos) break;
    spans.push_back({begin, begin + literal.size(), true});
    from = begin + literal.size();
  }
  return spans;
}

std::string replace_all(std::string_view text, const Pattern& pattern, std::string_view content) {
  std::string out;
  out.reserve(text.size());
  for (const Span& span : cut(text, pattern)) {
    out += span.is_match ? content : text.substr(span.begin, span.end - span.begin);
  }
  return out;
}

std::string Normalizer::apply(std::string_view text) const {
  std::string out(text);
  for (const auto& step : steps_) {
    if (const Prepend* prepend = std::get_if<Prepend>(&step)) {
      if (!out.empty()) out.insert(0, prepend->prefix);
    } else {
      const Replace& replace = std::get<Replace>(step);
      out = replace_all(out, replace.pattern, replace.content);
    }
  }
  return out;
}

}  // namespace lighter::tokenizer
