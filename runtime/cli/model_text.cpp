#include "runtime/cli/model_text.h"

#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>

#include "runtime/error.h"
#include "runtime/tokenizer/chat.h"

namespace lighter::cli {
namespace {

constexpr int kSyntheticPrompt = 16;  // tokens, where there is neither tokenizer nor prompt

std::set<int64_t> read_stop_tokens(const std::filesystem::path& model_dir) {
  for (const char* name : {"generation_config.json", "config.json"}) {
    std::ifstream in(model_dir / name);
    if (!in) continue;
    nlohmann::json parsed = nlohmann::json::parse(in, nullptr, false);
    if (parsed.is_discarded()) throw CheckpointError((model_dir / name).string() + ": is not valid JSON");
    if (parsed.contains("text_config")) parsed = parsed["text_config"];
    const auto found = parsed.find("eos_token_id");
    if (found == parsed.end() || found->is_null()) continue;
    try {
      if (found->is_number_integer()) return {found->get<int64_t>()};
      return found->get<std::set<int64_t>>();
    } catch (const nlohmann::json::exception&) {
      throw CheckpointError((model_dir / name).string() + ": eos_token_id must be an id or a list of ids");
    }
  }
  return {};
}

std::vector<int64_t> chat_ids(const Tokenizer& tokenizer, const PromptOptions& prompt) {
  const auto format = detect_chat_format(tokenizer);
  if (!format) {
    throw ConfigError(
        "--chat: the model's tokenizer has neither Llama 4's nor Llama 3's chat tokens; it is a base "
        "model or of another family: leave --chat out");
  }
  std::vector<ChatMessage> messages;
  if (!prompt.system.empty()) messages.push_back({"system", prompt.system});
  messages.push_back({"user", prompt.text.value_or("")});
  return tokenizer.encode(render_chat(*format, messages, true), false);
}

std::vector<int64_t> prompt_ids(const ModelText& text, const PromptOptions& prompt) {
  if (!prompt.ids.empty()) return {prompt.ids.begin(), prompt.ids.end()};
  if (!text.tokenizer) {
    if (prompt.text) {
      throw ConfigError(
          "there is no tokenizer (synthetic weights have none, and a folder needs tokenizer.json); "
          "give the prompt as --prompt-ids 1,2,3");
    }
    std::vector<int64_t> ids(kSyntheticPrompt);
    std::iota(ids.begin(), ids.end(), 1);
    return ids;
  }
  if (prompt.chat) return chat_ids(*text.tokenizer, prompt);
  auto ids = text.tokenizer->encode(prompt.text.value_or(""), true);
  if (ids.empty()) throw ConfigError("there is no prompt; give one with --prompt TEXT or --prompt-ids 1,2,3");
  return ids;
}

}  // namespace

ModelText load_text(const ModelConfig& config) {
  ModelText text;
  if (config.is_synthetic()) return text;
  if (std::filesystem::exists(config.path / "tokenizer.json")) {
    text.tokenizer.emplace(Tokenizer::load(config.path));
  }
  text.stop_tokens = read_stop_tokens(config.path);
  return text;
}

GenerateRequest make_request(const Config& config, const PreparedModel& model, const ModelText& text,
                             const PromptOptions& prompt, long long max_tokens) {
  const GenerateConfig& generate = config.generate;
  GenerateRequest request;
  request.prompt = prompt_ids(text, prompt);
  request.max_tokens = max_tokens >= 0 ? max_tokens : generate.max_tokens;
  request.prefill_chunk = model.prefill_chunk;
  request.sampling = {generate.temperature, generate.top_k, generate.top_p, generate.min_p, generate.seed};
  if (!generate.ignore_eos) request.stop_tokens = text.stop_tokens;
  request.stop = generate.stop;
  check_request(request, config.memory.context, model.spec.vocab, text.tokenizer.has_value());
  return request;
}

}  // namespace lighter::cli
