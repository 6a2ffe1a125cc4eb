#include "runtime/tokenizer/load_json.h"

#include <utility>

#include "runtime/tokenizer/regex_dialect.h"

namespace lighter::tokenizer {
namespace {

constexpr int kMaxNesting = 16;

// Calls visit for the component, or for each of a Sequence's, in order.
template <class Visit>
void for_each_component(const JsonField& field, std::string_view list_key, const Visit& visit,
                        int depth = 0) {
  if (depth == kMaxNesting) field.fail("nests deeper than " + std::to_string(kMaxNesting) + " sequences");
  if (field.type() != "Sequence") return visit(field);
  field.only_keys({"type", list_key});
  for (const JsonField& item : field.at(list_key).items()) {
    for_each_component(item, list_key, visit, depth + 1);
  }
}

[[noreturn]] void fail_type(const JsonField& field, const std::string& what, const std::string& known) {
  field.at("type").fail("the " + what + " \"" + field.type() + "\" is not supported; supported are " + known);
}

SplitBehavior load_behavior(const JsonField& field) {
  const std::string& name = field.string();
  if (name == "Removed") return SplitBehavior::removed;
  if (name == "Isolated") return SplitBehavior::isolated;
  if (name == "MergedWithPrevious") return SplitBehavior::merged_with_previous;
  if (name == "MergedWithNext") return SplitBehavior::merged_with_next;
  if (name == "Contiguous") return SplitBehavior::contiguous;
  field.fail("the behavior \"" + name + "\" is not known");
}

struct Metaspace {
  std::string replacement;
  PrependScheme prepend;
  bool split;
};

// Pre-tokenizer and decoder share one form. Older files say add_prefix_space instead of prepend_scheme.
Metaspace load_metaspace(const JsonField& field) {
  field.only_keys({"type", "replacement", "prepend_scheme", "split", "add_prefix_space", "str_rep"});
  Metaspace out{field.at("replacement").string(), PrependScheme::always, field.boolean_or("split", true)};
  if (out.replacement.empty()) field.at("replacement").fail("must be one character, but is empty");
  if (const auto scheme = field.find("prepend_scheme")) {
    const std::string& name = scheme->string();
    if (name != "always" && name != "first" && name != "never") scheme->fail("\"" + name + "\" is not known");
    out.prepend = name == "always"  ? PrependScheme::always
                  : name == "first" ? PrependScheme::first
                                    : PrependScheme::never;
  }
  if (!field.boolean_or("add_prefix_space", true)) {
    if (field.find("prepend_scheme") && out.prepend != PrependScheme::never) {
      field.at("add_prefix_space").fail("contradicts prepend_scheme");
    }
    out.prepend = PrependScheme::never;
  }
  return out;
}

int load_count(const JsonField& field) {
  const std::int64_t count = field.integer();
  if (count < 0 || count > 1'000'000)
    field.fail("must be from 0 to 1000000, but is " + std::to_string(count));
  return static_cast<int>(count);
}

}  // namespace

Pattern load_pattern(const JsonField& field) {
  field.only_keys({"String", "Regex"});
  const auto literal = field.find("String"), regex = field.find("Regex");
  if (literal.has_value() == regex.has_value()) field.fail("must have either \"String\" or \"Regex\"");
  const JsonField& given = literal ? *literal : *regex;
  if (given.string().empty()) given.fail("must not be empty");
  if (literal) return Pattern(literal->string());
  try {
    return Pattern(std::in_place_type<Regex>, regex->string());
  } catch (const UnsupportedRegex& error) {
    regex->fail(error.what());
  }
}

Normalizer load_normalizer(const std::optional<JsonField>& field) {
  Normalizer out;
  if (!field) return out;
  for_each_component(*field, "normalizers", [&](const JsonField& step) {
    const std::string& type = step.type();
    if (type == "Prepend") {
      step.only_keys({"type", "prepend"});
      out.add_prepend(step.at("prepend").string());
    } else if (type == "Replace") {
      step.only_keys({"type", "pattern", "content"});
      Pattern pattern = load_pattern(step.at("pattern"));
      const JsonField content = step.at("content");
      if (std::holds_alternative<Regex>(pattern) && content.string().find('$') != std::string::npos) {
        content.fail("\"$\" refers to groups of the regular expression, which is not supported");
      }
      out.add_replace(std::move(pattern), content.string());
    } else {
      fail_type(step, "normalizer", "Prepend, Replace and Sequence");
    }
  });
  return out;
}

PreTokenizer load_pre_tokenizer(const std::optional<JsonField>& field) {
  PreTokenizer out;
  if (!field) return out;
  bool is_first = true;
  for_each_component(*field, "pretokenizers", [&](const JsonField& step) {
    const std::string& type = step.type();
    if (type == "Split") {
      step.only_keys({"type", "pattern", "behavior", "invert"});
      out.add(SplitStep{load_pattern(step.at("pattern")), load_behavior(step.at("behavior")),
                        step.boolean_or("invert", false)});
    } else if (type == "ByteLevel") {
      step.only_keys({"type", "add_prefix_space", "trim_offsets", "use_regex"});
      out.add(ByteLevelStep{step.boolean_or("add_prefix_space", true), step.boolean_or("use_regex", true)});
    } else if (type == "Metaspace") {
      Metaspace metaspace = load_metaspace(step);
      if (metaspace.prepend == PrependScheme::first && !is_first) {
        step.at("prepend_scheme").fail("\"first\" is supported in the first pre-tokenizer only");
      }
      out.add(MetaspaceStep{std::move(metaspace.replacement), metaspace.prepend, metaspace.split});
    } else if (type == "Digits") {
      step.only_keys({"type", "individual_digits"});
      const bool each = step.at("individual_digits").boolean();
      out.add(SplitStep{Regex("\\p{N}"), each ? SplitBehavior::isolated : SplitBehavior::contiguous, false});
    } else {
      fail_type(step, "pre-tokenizer", "Split, ByteLevel, Metaspace, Digits and Sequence");
    }
    is_first = false;
  });
  return out;
}

std::vector<DecoderStep> load_decoder(const std::optional<JsonField>& field) {
  std::vector<DecoderStep> out;
  if (!field) return {{.kind = DecoderKind::join}};
  for_each_component(*field, "decoders", [&](const JsonField& step) {
    const std::string& type = step.type();
    DecoderStep next{.kind = DecoderKind::fuse};
    if (type == "ByteLevel") {
      step.only_keys({"type", "add_prefix_space", "trim_offsets", "use_regex"});
      next.kind = DecoderKind::byte_level;
    } else if (type == "ByteFallback" || type == "Fuse") {
      step.only_keys({"type"});
      next.kind = type == "Fuse" ? DecoderKind::fuse : DecoderKind::byte_fallback;
    } else if (type == "Replace") {
      step.only_keys({"type", "pattern", "content"});
      Pattern pattern = load_pattern(step.at("pattern"));
      if (std::holds_alternative<Regex>(pattern)) step.at("pattern").fail("a decoder must have a \"String\"");
      next = {.kind = DecoderKind::replace,
              .pattern = std::get<std::string>(std::move(pattern)),
              .content = step.at("content").string()};
    } else if (type == "Metaspace") {
      Metaspace metaspace = load_metaspace(step);
      next = {.kind = DecoderKind::metaspace,
              .pattern = std::move(metaspace.replacement),
              .drop_first = metaspace.prepend != PrependScheme::never};
    } else if (type == "Strip") {
      step.only_keys({"type", "content", "start", "stop"});
      next = {.kind = DecoderKind::strip,
              .content = step.at("content").string(),
              .start = load_count(step.at("start")),
              .stop = load_count(step.at("stop"))};
      if (next.content.empty()) step.at("content").fail("must be one character, but is empty");
    } else {
      fail_type(step, "decoder", "ByteLevel, ByteFallback, Fuse, Replace, Metaspace, Strip and Sequence");
    }
    // Tokens that were joined can be streamed only through steps that need not see all of the text.
    if (!out.empty() && fuses(out.back().kind) && next.kind != DecoderKind::fuse) {
      const bool can_stream =
          next.kind == DecoderKind::strip && next.stop == 0 && out.back().kind != DecoderKind::byte_fallback;
      if (!can_stream) step.fail("cannot follow a step that joins tokens or bytes");
    }
    out.push_back(std::move(next));
  });
  return out;
}

Surroundings load_post_processor(const std::optional<JsonField>& field) {
  Surroundings out;
  if (!field) return out;
  for_each_component(*field, "processors", [&](const JsonField& step) {
    if (step.type() == "ByteLevel") return;  // it moves offsets, not ids
    if (step.type() != "TemplateProcessing") {
      fail_type(step, "post-processor", "TemplateProcessing, ByteLevel and Sequence");
    }
    step.only_keys({"type", "single", "pair", "special_tokens"});
    const JsonField tokens = step.at("special_tokens");
    std::vector<std::int64_t> before, after;
    int texts = 0;
    for (const JsonField& piece : step.at("single").items()) {
      piece.only_keys({"Sequence", "SpecialToken"});
      if (const auto sequence = piece.find("Sequence")) {
        if (sequence->at("id").string() != "A")
          sequence->at("id").fail("one text has only the sequence \"A\"");
        ++texts;
        continue;
      }
      const std::string name = piece.at("SpecialToken").at("id").string();
      for (const JsonField& id : tokens.at(name).at("ids").items()) {
        (texts == 0 ? before : after).push_back(id.integer());
      }
    }
    if (texts != 1)
      step.at("single").fail("must hold the text once, but holds it " + std::to_string(texts) + "×");
    out.prefix.insert(out.prefix.begin(), before.begin(), before.end());
    out.suffix.insert(out.suffix.end(), after.begin(), after.end());
  });
  return out;
}

TokenizerParts load_parts(std::string_view json_text, const std::string& source) {
  const JsonDocument document = parse_document(json_text, source);
  const JsonField root(document.rest, source);
  root.only_keys({"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
                  "post_processor", "decoder", "model"});
  if (const auto version = root.find("version"); version && version->string() != "1.0") {
    version->fail("must be \"1.0\", but is \"" + version->string() + "\"");
  }
  Normalizer normalizer = load_normalizer(root.find("normalizer"));
  Bpe model = load_model(root.at("model"), document.tables);
  AddedVocabulary added = load_added_tokens(root.find("added_tokens"), model.vocabulary(), normalizer);
  Surroundings around = load_post_processor(root.find("post_processor"));
  for (const auto* ids : {&around.prefix, &around.suffix}) {
    for (const std::int64_t id : *ids) {
      if (model.vocabulary().has(id) || added.by_id.count(id) != 0) continue;
      root.at("post_processor").fail("adds the id " + std::to_string(id) + ", which no token has");
    }
  }
  return {std::move(added),
          std::move(normalizer),
          load_pre_tokenizer(root.find("pre_tokenizer")),
          std::move(model),
          std::move(around.prefix),
          std::move(around.suffix),
          load_decoder(root.find("decoder"))};
}

}  // namespace lighter::tokenizer
