// The chat formats of Llama 3 and Llama 4: messages → the text that the model was trained on. Stateless.
#pragma once

#include <optional>
#include <span>
#include <string>

#include "runtime/tokenizer/tokenizer.h"

namespace lighter {

enum class ChatFormat {
  llama4,  // <|header_start|>user<|header_end|>\n\n…<|eot|>; user text verbatim, system text trimmed
  llama3,  // <|start_header_id|>user<|end_header_id|>\n\n…<|eot_id|>; all text trimmed
};

struct ChatMessage {
  std::string role;  // system, user, assistant, or tool (which the formats call ipython)
  std::string content;
};

// The text of a conversation, which begins with <|begin_of_text|>: encode it with add_special_tokens = false,
// or it gets two. add_generation_prompt: end with the opening of the assistant's answer. What a stranger
// wrote is not escaped: special tokens in a message's content become special tokens. Throws ConfigError for
// an unknown role.
std::string render_chat(ChatFormat format, std::span<const ChatMessage> messages, bool add_generation_prompt);

// By the header tokens that the vocabulary has; nothing if it has neither form.
std::optional<ChatFormat> detect_chat_format(const Tokenizer& tokenizer);

}  // namespace lighter
