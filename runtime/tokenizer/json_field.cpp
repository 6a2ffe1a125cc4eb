#include "runtime/tokenizer/json_field.h"

#include <algorithm>

#include "runtime/error.h"

namespace lighter::tokenizer {

void JsonField::fail(const std::string& problem) const {
  throw CheckpointError(*source_ + ": " + (path_.empty() ? "" : "field " + path_ + ": ") + problem);
}

void JsonField::require_object() const {
  if (!value_->is_object()) fail(std::string("must be an object, but is ") + value_->type_name());
}

JsonField JsonField::at(std::string_view key) const {
  require_object();
  const auto found = value_->find(std::string(key));
  const std::string path = path_.empty() ? std::string(key) : path_ + "." + std::string(key);
  if (found == value_->end()) throw CheckpointError(*source_ + ": field " + path + ": is missing");
  return JsonField(*found, *source_, path);
}

std::optional<JsonField> JsonField::find(std::string_view key) const {
  require_object();
  const auto found = value_->find(std::string(key));
  if (found == value_->end() || found->is_null()) return std::nullopt;
  return at(key);
}

std::vector<JsonField> JsonField::items() const {
  if (!value_->is_array()) fail(std::string("must be an array, but is ") + value_->type_name());
  std::vector<JsonField> out;
  out.reserve(value_->size());
  for (std::size_t i = 0; i < value_->size(); ++i) {
    out.push_back(JsonField((*value_)[i], *source_, path_ + "[" + std::to_string(i) + "]"));
  }
  return out;
}

const std::string& JsonField::string() const {
  if (!value_->is_string()) fail(std::string("must be a string, but is ") + value_->type_name());
  return value_->get_ref<const std::string&>();
}

bool JsonField::boolean() const {
  if (!value_->is_boolean()) fail(std::string("must be true or false, but is ") + value_->type_name());
  return value_->get<bool>();
}

std::int64_t JsonField::integer() const {
  if (!value_->is_number_integer()) fail(std::string("must be an integer, but is ") + value_->type_name());
  return value_->get<std::int64_t>();
}

bool JsonField::boolean_or(std::string_view key, bool otherwise) const {
  const auto field = find(key);
  return field ? field->boolean() : otherwise;
}

void JsonField::only_keys(std::initializer_list<std::string_view> known) const {
  require_object();
  for (const auto& [key, value] : value_->items()) {
    if (std::find(known.begin(), known.end(), key) != known.end()) continue;
    at(key).fail("is not known to this tokenizer, and ignoring it could change the ids");
  }
}

}  // namespace lighter::tokenizer
