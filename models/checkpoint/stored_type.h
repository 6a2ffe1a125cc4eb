// How the elements of a tensor are stored in a checkpoint file. Stateless functions.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace lighter::models {

// `other`: a type that this version does not know; such a tensor is listed but cannot be read as numbers.
enum class StoredType {
  fp64,
  fp32,
  fp16,
  bf16,
  fp8_e4m3,
  fp8_e5m2,
  int64,
  int32,
  int16,
  int8,
  uint64,
  uint32,
  uint16,
  uint8,
  boolean,
  other,
};

// "bf16", "fp8_e4m3", ...; "other".
std::string to_string(StoredType type);

// Bytes of one element; 0 for `other`.
std::uint64_t element_bytes(StoredType type);

// The name that safetensors uses ("BF16") and back. CheckpointError for `other`; unknown names are `other`.
std::string safetensors_name(StoredType type);
StoredType type_from_safetensors_name(std::string_view name);

}  // namespace lighter::models
