#include "runtime/tokenizer/chat.h"

#include <string_view>

#include "runtime/error.h"
#include "runtime/tokenizer/utf8.h"

namespace lighter {
namespace {

struct Marks {
  std::string_view header_start;
  std::string_view header_end;
  std::string_view end_of_turn;
};

Marks marks_of(ChatFormat format) {
  if (format == ChatFormat::llama4) return {"<|header_start|>", "<|header_end|>", "<|eot|>"};
  return {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"};
}

std::string_view role_name(const std::string& role) {
  if (role == "tool" || role == "ipython") return "ipython";
  if (role == "system" || role == "user" || role == "assistant") return role;
  throw ConfigError("a chat message has the role \"" + role +
                    "\"; known are system, user, assistant and tool");
}

// The published templates use Python's str.strip, for which the ASCII separators U+001C … U+001F are space,
// too.
std::string_view trimmed(std::string_view text) {
  const auto is_separator = [](char c) { return c >= 0x1C && c <= 0x1F; };
  for (std::size_t before = text.size() + 1; text.size() < before && !text.empty();) {
    before = text.size();
    text.remove_prefix(tokenizer::leading_space_end(text));
    text = text.substr(0, tokenizer::trailing_space_begin(text));
    if (!text.empty() && is_separator(text.front())) text.remove_prefix(1);
    if (!text.empty() && is_separator(text.back())) text.remove_suffix(1);
  }
  return text;
}

}  // namespace

std::string render_chat(ChatFormat format, std::span<const ChatMessage> messages,
                        bool add_generation_prompt) {
  const Marks marks = marks_of(format);
  std::string out = "<|begin_of_text|>";
  const auto open = [&](std::string_view role) {
    out.append(marks.header_start).append(role).append(marks.header_end).append("\n\n");
  };
  for (const ChatMessage& message : messages) {
    open(role_name(message.role));
    const bool trims = format == ChatFormat::llama3 || message.role == "system";
    out.append(trims ? trimmed(message.content) : std::string_view(message.content))
        .append(marks.end_of_turn);
  }
  if (add_generation_prompt) open("assistant");
  return out;
}

std::optional<ChatFormat> detect_chat_format(const Tokenizer& tokenizer) {
  if (tokenizer.token_id("<|header_start|>")) return ChatFormat::llama4;
  if (tokenizer.token_id("<|start_header_id|>")) return ChatFormat::llama3;
  return std::nullopt;
}

}  // namespace lighter
