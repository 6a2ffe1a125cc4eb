#include "models/architectures.h"

namespace lighter::models {

ModelSpec read_spec(const std::filesystem::path& config_json) {
  const ConfigReader config = read_config(config_json);
  check_quantization(config);
  const auto architectures = config.texts("architectures");
  const std::string name = architectures.empty() ? config.text("model_type", "") : architectures.front();
  const auto is = [&](auto... names) { return ((name == names) || ...); };
  if (is("Llama4ForConditionalGeneration", "Llama4ForCausalLM", "llama4", "llama4_text")) {
    return llama4_spec(config);
  }
  if (is("LlamaForCausalLM", "llama")) return llama3_spec(config);
  if (is("MixtralForCausalLM", "mixtral")) return mixtral_spec(config);
  config.fail("architecture '" + name +
              "' is not supported; Llama4ForConditionalGeneration, Llama4ForCausalLM, LlamaForCausalLM and "
              "MixtralForCausalLM are");
}

}  // namespace lighter::models
