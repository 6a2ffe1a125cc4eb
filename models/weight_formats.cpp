#include "models/weight_formats.h"

#include <algorithm>

#include "runtime/error.h"

namespace lighter::models {
namespace {

bool is_gate_up(WeightRole role) {
  return role == WeightRole::shared_gate_up || role == WeightRole::dense_gate_up;
}
bool is_down(WeightRole role) {
  return role == WeightRole::shared_down || role == WeightRole::dense_down;
}

constexpr int64_t kNarrowestSlice = 256;

PackedWeight ffn_form(SliceEncoding encoding, int64_t hidden, int64_t width, int64_t wanted_slice) {
  const bool fits = wanted_slice > 0 && wanted_slice % kNarrowestSlice == 0 && width % wanted_slice == 0;
  const int64_t slice = fits ? wanted_slice : kNarrowestSlice;
  if (width % slice != 0) {
    throw ConfigError(std::string(encoding_name(encoding)) + " needs an FFN width that is a multiple of " +
                      std::to_string(slice) + ", not " + std::to_string(width) +
                      "; keep this weight in the model's dtype");
  }
  packed_slice_bytes(encoding, hidden, slice);  // throws for sizes that do not fit
  return {encoding, hidden, hidden, width / slice, slice, nullptr};
}

std::string key_of(const Weight& weight) {
  switch (weight.weight_class) {
    case WeightClass::attention:
      return "model.attention, layer " + std::to_string(weight.layer);
    case WeightClass::head:
      return "model.head";
    default:
      return "model.shared, layer " + std::to_string(weight.layer);
  }
}

}  // namespace

SliceEncoding WeightFormats::of(const Weight& weight) const {
  switch (weight.weight_class) {
    case WeightClass::attention:
      return attention.at(weight.layer);
    case WeightClass::shared_expert:
    case WeightClass::dense_ffn:
      return shared.at(weight.layer);
    case WeightClass::head:
      return head;
    case WeightClass::embedding:
    case WeightClass::norms:
    case WeightClass::router:
      return SliceEncoding::dense;
  }
  return SliceEncoding::dense;
}

bool WeightFormats::any_packed() const {
  const auto packed = [](SliceEncoding encoding) { return encoding != SliceEncoding::dense; };
  return packed(head) || std::ranges::any_of(shared, packed) || std::ranges::any_of(attention, packed);
}

WeightFormats dense_formats(const ModelSpec& spec, DType dtype) {
  WeightFormats formats;
  formats.dtype = dtype;
  formats.shared.assign(spec.layers.size(), SliceEncoding::dense);
  formats.attention = formats.shared;
  return formats;
}

PackedWeight packed_form(const WeightFormats& formats, const Weight& weight) try {
  const SliceEncoding encoding = formats.of(weight);
  const TensorPart& part = weight.parts.front();
  if (is_gate_up(weight.role)) return ffn_form(encoding, part.columns, part.rows, formats.slice_width);
  const PackedWeight matrix{encoding, weight.shape().front(), part.columns, 0, 0, nullptr};
  matrix.bytes();  // throws for sizes that do not fit
  return matrix;
} catch (const ConfigError& error) {
  throw ConfigError(key_of(weight) + ": " + error.what());
}

uint64_t weight_bytes(const WeightFormats& formats, const Weight& weight) {
  if (formats.of(weight) == SliceEncoding::dense) {
    return static_cast<uint64_t>(weight.elements()) * dtype_size(formats.dtype);
  }
  return is_down(weight.role) ? 0 : packed_form(formats, weight).bytes();
}

}  // namespace lighter::models
