#include "models/checkpoint/stored_type.h"

#include <array>

#include "runtime/error.h"

namespace lighter::models {
namespace {

struct TypeRow {
  StoredType type;
  const char* name;
  const char* safetensors_name;
  std::uint64_t bytes;
};

constexpr std::array<TypeRow, 15> kTypes = {{
    {StoredType::fp64, "fp64", "F64", 8},
    {StoredType::fp32, "fp32", "F32", 4},
    {StoredType::fp16, "fp16", "F16", 2},
    {StoredType::bf16, "bf16", "BF16", 2},
    {StoredType::fp8_e4m3, "fp8_e4m3", "F8_E4M3", 1},
    {StoredType::fp8_e5m2, "fp8_e5m2", "F8_E5M2", 1},
    {StoredType::int64, "int64", "I64", 8},
    {StoredType::int32, "int32", "I32", 4},
    {StoredType::int16, "int16", "I16", 2},
    {StoredType::int8, "int8", "I8", 1},
    {StoredType::uint64, "uint64", "U64", 8},
    {StoredType::uint32, "uint32", "U32", 4},
    {StoredType::uint16, "uint16", "U16", 2},
    {StoredType::uint8, "uint8", "U8", 1},
    {StoredType::boolean, "boolean", "BOOL", 1},
}};

const TypeRow* row_of(StoredType type) {
  for (const TypeRow& row : kTypes) {
    if (row.type == type) return &row;
  }
  return nullptr;
}

}  // namespace

std::string to_string(StoredType type) {
  const TypeRow* row = row_of(type);
  return row == nullptr ? "other" : row->name;
}

std::uint64_t element_bytes(StoredType type) {
  const TypeRow* row = row_of(type);
  return row == nullptr ? 0 : row->bytes;
}

std::string safetensors_name(StoredType type) {
  const TypeRow* row = row_of(type);
  if (row == nullptr) throw CheckpointError("a tensor of an unknown type cannot be written");
  return row->safetensors_name;
}

StoredType type_from_safetensors_name(std::string_view name) {
  for (const TypeRow& row : kTypes) {
    if (row.safetensors_name == name) return row.type;
  }
  return StoredType::other;
}

}  // namespace lighter::models
