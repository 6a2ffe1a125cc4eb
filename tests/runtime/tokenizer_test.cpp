// The goldens are made by tests/tokenizer/make_tokenizer_goldens.py with the reference `tokenizers` package.
#include "runtime/tokenizer/tokenizer.h"

#include <doctest/doctest.h>

#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "runtime/error.h"
#include "runtime/tokenizer/utf8.h"

namespace {

using nlohmann::json;
using Ids = std::vector<std::int64_t>;

const std::filesystem::path kData = std::filesystem::path(LIGHTER_SOURCE_DIR) / "tests/tokenizer";
constexpr const char* kFolders[] = {"llama3", "llama4", "byte_fallback"};

json read_json(const std::string& name) {
  std::ifstream file(kData / name);
  REQUIRE(file.good());
  return json::parse(file);
}

const json& goldens() {
  static const json value = read_json("goldens.json");
  return value;
}

std::string streamed(const lighter::Tokenizer& tokenizer, const Ids& ids, bool skip_special) {
  lighter::StreamDecoder stream(tokenizer, skip_special);
  std::string out;
  for (const std::int64_t id : ids) {
    const std::string text = stream.push(id);
    CHECK(lighter::tokenizer::is_valid_utf8(text));
    out += text;
  }
  return out + stream.flush();
}

std::string hash_of(const Ids& ids) {
  std::uint64_t value = 0xCBF29CE484222325u;
  for (const std::int64_t id : ids) value = (value ^ static_cast<std::uint64_t>(id)) * 0x100000001B3u;
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

// A small valid tokenizer.json, to be broken in one place.
json small_spec() {
  return json::parse(R"({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [
      {"id": 3, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
       "special": true}],
    "normalizer": null, "pre_tokenizer": null, "post_processor": null, "decoder": null,
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}})");
}

lighter::Tokenizer parse(const json& spec) {
  return lighter::Tokenizer::parse(spec.dump(), "test.json");
}

// The message of the CheckpointError that the spec leads to.
std::string refusal(const std::string& text) {
  try {
    lighter::Tokenizer::parse(text, "test.json");
  } catch (const lighter::CheckpointError& error) {
    return error.what();
  }
  return "";
}

void check_refused(const char* patch, const std::string& field) {
  json spec = small_spec();
  spec.merge_patch(json::parse(patch));
  const std::string message = refusal(spec.dump());
  INFO(std::string(patch) << " → " << message);
  CHECK(message.find("test.json: ") == 0);
  CHECK(message.find("field " + field + ":") != std::string::npos);
}

}  // namespace

TEST_CASE("ids of a thousand hard strings equal the reference's") {
  for (const char* folder : kFolders) {
    const lighter::Tokenizer tokenizer = lighter::Tokenizer::load(kData / folder);
    const json& golden = goldens().at(folder);
    CHECK(tokenizer.vocab_size() == golden.at("vocab_size").get<std::int64_t>());
    CHECK(golden.at("texts").size() >= 1000);
    const Ids prefix = golden.at("prefix");
    for (const json& row : golden.at("texts")) {
      const std::string text = row.at("text");
      INFO(std::string(folder) << ": " << row.dump());
      const Ids ids = row.at("ids");
      CHECK(tokenizer.encode(text, false) == ids);
      Ids with_special = prefix;
      with_special.insert(with_special.end(), ids.begin(), ids.end());
      CHECK(tokenizer.encode(text, true) == with_special);
      CHECK(tokenizer.encode(text, false, false) == row.value("plain_ids", ids));
    }
  }
}

TEST_CASE("decoded text equals the reference's and streams to the same") {
  for (const char* folder : kFolders) {
    const lighter::Tokenizer tokenizer = lighter::Tokenizer::load(kData / folder);
    for (const json& row : goldens().at(folder).at("texts")) {
      const std::string text = row.at("text");
      INFO(std::string(folder) << ": " << row.dump());
      const Ids ids = row.at("ids");
      CHECK(tokenizer.decode(ids, false) == row.value("decoded", text));
      CHECK(tokenizer.decode(ids, true) == row.value("decoded_skipping", text));
      CHECK(streamed(tokenizer, ids, false) == row.value("decoded", text));
      CHECK(streamed(tokenizer, ids, true) == row.value("decoded_skipping", text));
    }
  }
}

TEST_CASE("sequences of ids that no text gives decode as in the reference") {
  for (const char* folder : kFolders) {
    const lighter::Tokenizer tokenizer = lighter::Tokenizer::load(kData / folder);
    for (const json& row : goldens().at(folder).at("sequences")) {
      INFO(std::string(folder) << ": " << row.dump());
      const Ids ids = row.at("ids");
      CHECK(tokenizer.decode(ids, false) == row.at("decoded").get<std::string>());
      CHECK(tokenizer.decode(ids, true) == row.at("decoded_skipping").get<std::string>());
      const std::string stream = streamed(tokenizer, ids, false);
      CHECK(lighter::tokenizer::is_valid_utf8(stream));
      // Byte fallback may have given out characters of a run that turned out bad later.
      if (std::string(folder) != "byte_fallback") CHECK(stream == row.at("decoded").get<std::string>());
    }
  }
}

TEST_CASE("long texts encode as in the reference and in time that grows with their length") {
  for (const char* folder : kFolders) {
    const lighter::Tokenizer tokenizer = lighter::Tokenizer::load(kData / folder);
    for (const json& row : goldens().at(folder).at("long_texts")) {
      std::string text;
      for (int i = 0; i < row.at("times").get<int>(); ++i) text += row.at("unit").get<std::string>();
      INFO(std::string(folder) << ": " << row.dump());
      const auto start = std::chrono::steady_clock::now();
      const Ids ids = tokenizer.encode(text, false);
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      CHECK(ids.size() == row.at("count").get<std::size_t>());
      CHECK(hash_of(ids) == row.at("hash").get<std::string>());
      // Tens of milliseconds when O(n log n); minutes when quadratic.
      CHECK(seconds.count() < 20.0);
    }
  }
}

TEST_CASE("every supported setting of every component does what the reference does") {
  const json data = read_json("components.json");
  for (const json& row : data.at("cases")) {
    json spec = data.at("base");
    for (const auto& [key, value] : row.at("setting").items()) {
      if (key == "model") {
        for (const auto& [field, given] : value.items()) {
          if (field == "vocab") {
            spec["model"]["vocab"].update(given);
          } else {
            spec["model"][field] = given;
          }
        }
      } else {
        spec[key] = value;
      }
    }
    const lighter::Tokenizer tokenizer = parse(spec);
    for (std::size_t i = 0; i < data.at("texts").size(); ++i) {
      const std::string text = data.at("texts")[i];
      INFO(row.at("setting").dump() << " on \"" << text << "\"");
      const json& expected = row.at("rows")[i];
      const Ids ids = expected[0];
      CHECK(tokenizer.encode(text, true) == ids);
      CHECK(tokenizer.encode(text, true, false) == (expected[1].is_null() ? ids : expected[1].get<Ids>()));
      CHECK(tokenizer.decode(ids, false) == expected[2].get<std::string>());
      CHECK(streamed(tokenizer, ids, false) == expected[2].get<std::string>());
    }
  }
}

TEST_CASE("a stream holds back the bytes of a character until it is whole") {
  const lighter::Tokenizer llama3 = lighter::Tokenizer::load(kData / "llama3");
  const lighter::Tokenizer mixtral = lighter::Tokenizer::load(kData / "byte_fallback");
  // U+10FFFD is in neither vocabulary: four byte tokens.
  for (const lighter::Tokenizer* tokenizer : {&llama3, &mixtral}) {
    Ids ids = tokenizer->encode("\U0010FFFD", false);
    ids.erase(ids.begin(), ids.end() - 4);
    lighter::StreamDecoder stream(*tokenizer, true);
    CHECK(stream.push(ids[0]) == "");
    CHECK(stream.push(ids[1]) == "");
    CHECK(stream.push(ids[2]) == "");
    CHECK(stream.push(ids[3]) == "\U0010FFFD");
    CHECK(stream.flush() == "");
    CHECK(stream.push(ids[0]) == "");
    CHECK(stream.flush() == "\uFFFD");
    CHECK(stream.flush() == "");
  }
}

TEST_CASE("a stream drops the first space of a Llama-2 text only, and again after a flush") {
  const lighter::Tokenizer tokenizer = lighter::Tokenizer::load(kData / "byte_fallback");
  const std::int64_t space = tokenizer.token_id("▁").value();
  lighter::StreamDecoder stream(tokenizer, true);
  CHECK(stream.push(1) == "");
  CHECK(stream.push(space) == "");
  CHECK(stream.push(space) == " ");
  CHECK(stream.flush() == "");
  CHECK(stream.push(space) == "");
  CHECK(stream.push(space) == " ");
}

TEST_CASE("a bad run of byte-fallback tokens streams its valid characters and then U+FFFD") {
  const lighter::Tokenizer tokenizer = lighter::Tokenizer::load(kData / "byte_fallback");
  const auto byte = [&](int value) { return std::int64_t{3} + value; };
  const Ids ids = {
      byte(0xE6), byte(0xBC), byte(0xA2), byte(0xE6), byte(0x41), byte(0x42), tokenizer.token_id("a").value(),
      byte(0x42)};
  CHECK(tokenizer.decode(ids, true) == "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFDaB");
  CHECK(streamed(tokenizer, ids, true) == "漢\uFFFD\uFFFD\uFFFDaB");
}

TEST_CASE("a text that is not UTF-8 encodes as if its bad parts were U+FFFD") {
  const lighter::Tokenizer tokenizer = lighter::Tokenizer::load(kData / "llama3");
  CHECK(tokenizer.encode("a\xFF\xE6\xBC z", false) == tokenizer.encode("a\uFFFD\uFFFD z", false));
  CHECK(tokenizer.encode("\xED\xA0\x80", false) == tokenizer.encode("\uFFFD\uFFFD\uFFFD", false));
}

TEST_CASE("ids that the vocabulary does not have decode to nothing") {
  const lighter::Tokenizer tokenizer = lighter::Tokenizer::load(kData / "llama3");
  const Ids ids = {-1, tokenizer.vocab_size(), tokenizer.token_id("a").value(), std::int64_t{1} << 40};
  CHECK(tokenizer.decode(ids, false) == "a");
  CHECK(streamed(tokenizer, ids, false) == "a");
  CHECK(!tokenizer.token(-1));
  CHECK(!tokenizer.token_id("<|no such token|>"));
}

TEST_CASE("of two added tokens that look the same after normalizing, the special one is found") {
  json spec = small_spec();
  spec["normalizer"] = json::parse(R"({"type": "Replace", "pattern": {"String": " "}, "content": "_"})");
  for (const bool special_first : {true, false}) {
    json first = spec["added_tokens"][0], second = first;
    first.update({{"content", "a a"}, {"normalized", true}, {"special", special_first}});
    second.update({{"content", "a_a"}, {"normalized", true}, {"special", !special_first}, {"id", 4}});
    json both = spec;
    both["added_tokens"] = {first, second};
    CHECK(parse(both).encode("a a", false) == Ids{special_first ? 3 : 4});
  }
}

TEST_CASE("special tokens are known by their content and flag") {
  const lighter::Tokenizer tokenizer = lighter::Tokenizer::load(kData / "llama4");
  const std::int64_t id = tokenizer.token_id("<|eot|>").value();
  CHECK(tokenizer.is_special(id));
  CHECK(tokenizer.token(id) == "<|eot|>");
  CHECK(!tokenizer.is_special(0));
  CHECK(!tokenizer.is_special(1 << 30));
}

TEST_CASE("threads share one tokenizer") {
  const lighter::Tokenizer tokenizer = lighter::Tokenizer::load(kData / "llama4");
  std::vector<std::thread> threads;
  std::vector<int> wrong(4, 0);
  for (std::size_t t = 0; t < wrong.size(); ++t) {
    threads.emplace_back([&, t] {
      for (const json& row : goldens().at("llama4").at("texts")) {
        wrong[t] += tokenizer.encode(row.at("text").get<std::string>(), false) != row.at("ids").get<Ids>();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == std::vector<int>(4, 0));
}

TEST_CASE("whatever is not supported is refused by the name of its field") {
  CHECK(refusal(small_spec().dump()) == "");
  check_refused(R"({"version": "2.0"})", "version");
  check_refused(R"({"surprise": 1})", "surprise");
  check_refused(R"({"normalizer": {"type": "NFC"}})", "normalizer.type");
  check_refused(
      R"({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "x"}, 7]}})",
      "normalizer.normalizers[1]");
  check_refused(R"({"normalizer": {"type": "Replace", "pattern": {"Regex": "a"}, "content": "$1"}})",
                "normalizer.content");
  check_refused(R"({"pre_tokenizer": {"type": "BertPreTokenizer"}})", "pre_tokenizer.type");
  check_refused(R"({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": 1}})",
                "pre_tokenizer.add_prefix_space");
  check_refused(R"({"pre_tokenizer": {"type": "ByteLevel", "new_option": true}})",
                "pre_tokenizer.new_option");
  check_refused(R"({"pre_tokenizer": {"type": "Split", "pattern": {"String": "a"}, "behavior": "Sideways"}})",
                "pre_tokenizer.behavior");
  check_refused(R"({"post_processor": {"type": "RobertaProcessing"}})", "post_processor.type");
  check_refused(R"({"post_processor": {"type": "TemplateProcessing", "single": [], "special_tokens": {}}})",
                "post_processor.single");
  check_refused(R"({"decoder": {"type": "WordPiece"}})", "decoder.type");
  check_refused(R"({"decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"},
                    {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}]}})",
                "decoder.decoders[1]");
  check_refused(R"({"model": {"type": "Unigram"}})", "model.type");
  check_refused(R"({"model": {"dropout": 0.1}})", "model.dropout");
  check_refused(R"({"model": {"continuing_subword_prefix": "##"}})", "model.continuing_subword_prefix");
  check_refused(R"({"model": {"end_of_word_suffix": "</w>"}})", "model.end_of_word_suffix");
  check_refused(R"({"model": {"unk_token": "<none>"}})", "model.unk_token");
  check_refused(R"({"model": {"merges": ["a b", "b b"]}})", "model.merges[1]");
  check_refused(R"({"model": {"merges": ["a  b"]}})", "model.merges[0]");
  check_refused(R"({"model": {"merges": [["a", "b", "c"]]}})", "model.merges[0]");
  check_refused(R"({"model": {"vocab": {"c": -1}}})", "model.vocab.c");
  check_refused(R"({"model": {"vocab": {"c": 1.5}}})", "model.vocab.c");
  check_refused(R"({"model": {"vocab": {"c": 1}}})", "model.vocab.c");
  check_refused(R"({"model": {"vocab": {"c": {}}}})", "model.vocab.c");
  check_refused(R"({"model": {"vocab": {"c": 18446744073709551615}}})", "model.vocab.c");
  check_refused(R"({"model": {"vocab": null}})", "model.vocab");
  check_refused(R"({"model": {"vocab": []}})", "model.vocab");
  check_refused(R"({"model": {"merges": {}}})", "model.merges");
  check_refused(R"({"model": {"merges": [["a", "b"], 7]}})", "model.merges[1]");
  check_refused(R"({"model": {"merges": [["a"]]}})", "model.merges[0]");
  check_refused(R"({"model": {"merges": [["a", 1]]}})", "model.merges[0]");
  check_refused(R"({"model": null})", "model");
  check_refused(R"({"added_tokens": [{"id": 3}]})", "added_tokens[0].content");
  check_refused(R"({"added_tokens": [{"id": 9, "content": "x", "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": true}]})",
                "added_tokens[0].id");
}

TEST_CASE("regular expressions that mean something else to another engine are refused") {
  for (const char* pattern :
       {R"(\w+)",        R"(\bx)",     R"(^a)",          R"(a$)",      R"([[:alpha:]])", R"([a&&b])",
        R"([a[b]])",     R"(\p{Han})", R"(\p{C})",       R"(a{2}+)",   R"(a{,2})",       R"((?m:a))",
        R"((?<name>a))", R"((?i:ss))", R"((?i:\p{Lu}))", R"((*FAIL))", R"(\h)",          R"(\x80)",
        R"([\s-a])",     R"((a)",      R"([a)",          R"([])",      R"(\)",           R"(\p{L)"}) {
    json spec = small_spec();
    spec["pre_tokenizer"] = {{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}};
    const std::string message = refusal(spec.dump());
    INFO(std::string(pattern) << " → " << message);
    CHECK(message.find("field pre_tokenizer.pattern.Regex:") != std::string::npos);
  }
}

TEST_CASE("a file that is broken or missing says so") {
  const std::string whole = small_spec().dump();
  for (const std::size_t length : {std::size_t{0}, std::size_t{1}, whole.size() / 2, whole.size() - 1}) {
    CHECK(refusal(whole.substr(0, length)).find("test.json: is not valid JSON") == 0);
  }
  CHECK(refusal("[]").find("must be an object") != std::string::npos);
  CHECK(refusal("{}").find("model") != std::string::npos);
  CHECK(refusal("\"\xFF\"").find("is not valid JSON") != std::string::npos);
  CHECK_THROWS_AS(lighter::Tokenizer::load(kData / "no such folder"), lighter::CheckpointError);
  std::string nested = R"({"type": "Digits", "individual_digits": true})";
  for (int i = 0; i < 40; ++i) nested = R"({"type": "Sequence", "pretokenizers": [)" + nested + "]}";
  json spec = small_spec();
  spec["pre_tokenizer"] = json::parse(nested);
  CHECK(refusal(spec.dump()).find("nests deeper") != std::string::npos);
  CHECK(refusal(std::string(100000, '[')).find("nests deeper") != std::string::npos);
  std::string twice = whole;
  twice.replace(twice.find("\"b\":1"), 5, "\"a\":1");
  CHECK(refusal(twice).find("field model.vocab.a:") != std::string::npos);
}
