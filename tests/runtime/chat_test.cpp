#include "runtime/tokenizer/chat.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>
#include <vector>

#include "runtime/error.h"

namespace {

using lighter::ChatFormat;
using lighter::ChatMessage;

const std::filesystem::path kData = std::filesystem::path(LIGHTER_SOURCE_DIR) / "tests/tokenizer";

std::string render(ChatFormat format, const std::vector<ChatMessage>& messages, bool prompt = true) {
  return lighter::render_chat(format, messages, prompt);
}

}  // namespace

TEST_CASE("Llama 4 trims the system's text and takes the user's as it is") {
  CHECK(render(ChatFormat::llama4, {{"user", " Hi \n"}}) ==
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\n Hi \n<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n");
  CHECK(render(ChatFormat::llama4, {{"system", " \n\u00A0Be brief.\t"}, {"user", "a"}, {"assistant", "b "}},
               false) ==
        "<|begin_of_text|><|header_start|>system<|header_end|>\n\nBe brief.<|eot|>"
        "<|header_start|>user<|header_end|>\n\na<|eot|><|header_start|>assistant<|header_end|>\n\nb <|eot|>");
}

TEST_CASE("Llama 3 trims every text") {
  CHECK(render(ChatFormat::llama3, {{"system", "  "}, {"user", "\n Hi \u3000"}}) ==
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n");
}

TEST_CASE("tool results have the role ipython and an unknown role is a ConfigError") {
  CHECK(render(ChatFormat::llama4, {{"tool", "42"}}, false) ==
        "<|begin_of_text|><|header_start|>ipython<|header_end|>\n\n42<|eot|>");
  CHECK(render(ChatFormat::llama3, {}, false) == "<|begin_of_text|>");
  CHECK_THROWS_AS(render(ChatFormat::llama4, {{"User", "x"}}), lighter::ConfigError);
}

TEST_CASE("the format is known by the vocabulary's header tokens") {
  CHECK(lighter::detect_chat_format(lighter::Tokenizer::load(kData / "llama4")) == ChatFormat::llama4);
  CHECK(lighter::detect_chat_format(lighter::Tokenizer::load(kData / "llama3")) == ChatFormat::llama3);
  CHECK(!lighter::detect_chat_format(lighter::Tokenizer::load(kData / "byte_fallback")));
}

TEST_CASE("an encoded chat has one BOS, and its marks are special tokens") {
  for (const auto& [folder, format] :
       {std::pair{"llama4", ChatFormat::llama4}, {"llama3", ChatFormat::llama3}}) {
    const lighter::Tokenizer tokenizer = lighter::Tokenizer::load(kData / folder);
    const auto ids = tokenizer.encode(render(format, {{"user", "Hello"}}), false);
    CHECK(std::count(ids.begin(), ids.end(), tokenizer.token_id("<|begin_of_text|>").value()) == 1);
    CHECK(std::count_if(ids.begin(), ids.end(), [&](auto id) { return tokenizer.is_special(id); }) == 6);
    CHECK(tokenizer.decode(ids, true) == "user\n\nHelloassistant\n\n");
  }
}
