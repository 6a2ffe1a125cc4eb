// tokenizer.json with its two huge tables, model.vocab and model.merges, read straight into flat arrays, and
// the rest as an ordinary document. A vocabulary of 200,000 tokens as a tree of JSON values takes three times
// as long.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace lighter::tokenizer {

// Strings are held in one arena, which the entries refer to.
struct TokenTables {
  struct Text {
    std::size_t offset;
    std::size_t length;
  };
  struct Entry {
    Text text;
    std::int64_t id;
  };
  struct Merge {
    Text left;
    Text right;
  };

  std::string_view text(const Text& t) const { return std::string_view(arena).substr(t.offset, t.length); }
  Text add(std::string_view text) {
    arena += text;
    return {arena.size() - text.size(), text.size()};
  }

  std::string arena;
  std::vector<Entry> vocab;   // in the file's order
  std::vector<Merge> merges;  // by rank; from "left right" or ["left", "right"]
};

struct JsonDocument {
  nlohmann::json rest;  // model.vocab and model.merges are left empty if they were an object and an array
  TokenTables tables;
};

// Throws CheckpointError, which begins with source, if text is not JSON, nests deeper than 64, or if an entry
// of the tables is not what it has to be.
JsonDocument parse_document(std::string_view text, const std::string& source);

}  // namespace lighter::tokenizer
