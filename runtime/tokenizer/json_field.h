// A place in tokenizer.json that knows its path, so that every error names the field.
//
// A view: the document must outlive it. Every accessor throws CheckpointError
// ("SOURCE: field PATH: PROBLEM") if the field is missing or of another type.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace lighter::tokenizer {

class JsonField {
 public:
  // source: what the messages begin with, usually the file's path. The root has an empty path.
  JsonField(const nlohmann::json& value, const std::string& source) : value_(&value), source_(&source) {}

  [[noreturn]] void fail(const std::string& problem) const;

  bool is_null() const { return value_->is_null(); }
  bool is_string() const { return value_->is_string(); }
  const nlohmann::json& json() const { return *value_; }

  JsonField at(std::string_view key) const;
  // The same value by a longer path, for messages about a part of it that is not held here.
  JsonField under(const std::string& suffix) const { return JsonField(*value_, *source_, path_ + suffix); }
  // Absent and null are the same thing in this format.
  std::optional<JsonField> find(std::string_view key) const;
  std::vector<JsonField> items() const;

  const std::string& string() const;
  bool boolean() const;
  std::int64_t integer() const;
  bool boolean_or(std::string_view key, bool otherwise) const;

  // The "type" of a component.
  const std::string& type() const { return at("type").string(); }
  // Refuses keys that this program would otherwise ignore.
  void only_keys(std::initializer_list<std::string_view> known) const;

 private:
  JsonField(const nlohmann::json& value, const std::string& source, std::string path)
      : value_(&value), source_(&source), path_(std::move(path)) {}
  void require_object() const;

  const nlohmann::json* value_;
  const std::string* source_;
  std::string path_;
};

}  // namespace lighter::tokenizer
