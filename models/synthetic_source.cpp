#include "models/synthetic_source.h"

#include <tbb/parallel_for.h>

#include <cmath>
#include <functional>

#include "models/architectures.h"
#include "models/packed_synthesis.h"
#include "runtime/float_convert.h"

namespace lighter::models {
namespace {

// Element i of the stream `key`: uniform with variance 1, so that matrices can be scaled to keep variances.
float uniform(uint64_t key, int64_t i) {
  const uint64_t four = splitmix64(key + static_cast<uint64_t>(i) / 4);
  const auto bits = static_cast<uint16_t>(four >> (16 * (i % 4)));
  constexpr float unit_variance = 1.7320508f / 32768.0f;
  return (static_cast<float>(bits) - 32767.5f) * unit_variance;
}

// Elements [first, first + count), in parallel.
void generate(uint64_t key, int64_t first, int64_t count, float scale, DType dtype, void* to) {
  constexpr int64_t grain = 1 << 16;
  tbb::parallel_for(int64_t{0}, (count + grain - 1) / grain, [&](int64_t block) {
    const int64_t begin = block * grain;
    const int64_t end = std::min(count, begin + grain);
    if (dtype == DType::fp32) {
      for (int64_t i = begin; i < end; ++i) static_cast<float*>(to)[i] = scale * uniform(key, first + i);
    } else {
      for (int64_t i = begin; i < end; ++i) {
        static_cast<uint16_t*>(to)[i] = fp32_to_bf16(scale * uniform(key, first + i));
      }
    }
  });
}

uint64_t fnv1a(const std::string& text) {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return hash;
}

ModelSpec scout() {
  nlohmann::json config = {{"hidden_size", 5120},          {"num_attention_heads", 40},
                           {"num_key_value_heads", 8},     {"head_dim", 128},
                           {"vocab_size", 202048},         {"num_hidden_layers", 48},
                           {"intermediate_size", 8192},    {"intermediate_size_mlp", 16384},
                           {"num_local_experts", 16},      {"num_experts_per_tok", 1},
                           {"attention_chunk_size", 8192}, {"max_position_embeddings", 10485760},
                           {"rope_theta", 500000.0},       {"rms_norm_eps", 1e-5}};
  config["rope_scaling"] = {{"rope_type", "llama3"},
                            {"factor", 16.0},
                            {"low_freq_factor", 1.0},
                            {"high_freq_factor", 1.0},
                            {"original_max_position_embeddings", 8192}};
  return llama4_spec({config, "preset scout"});
}

ModelSpec llama_3_1_8b() {
  nlohmann::json config = {
      {"hidden_size", 4096},    {"num_attention_heads", 32}, {"num_key_value_heads", 8},
      {"vocab_size", 128256},   {"num_hidden_layers", 32},   {"intermediate_size", 14336},
      {"rope_theta", 500000.0}, {"rms_norm_eps", 1e-5},      {"max_position_embeddings", 131072}};
  config["rope_scaling"] = {{"rope_type", "llama3"},
                            {"factor", 8.0},
                            {"low_freq_factor", 1.0},
                            {"high_freq_factor", 4.0},
                            {"original_max_position_embeddings", 8192}};
  return llama3_spec({config, "preset llama-3.1-8b"});
}

ModelSpec mixtral_8x7b() {
  const nlohmann::json config = {
      {"hidden_size", 4096},    {"num_attention_heads", 32},       {"num_key_value_heads", 8},
      {"vocab_size", 32000},    {"num_hidden_layers", 32},         {"intermediate_size", 14336},
      {"num_local_experts", 8}, {"num_experts_per_tok", 2},        {"rope_theta", 1e6},
      {"rms_norm_eps", 1e-5},   {"max_position_embeddings", 32768}};
  return mixtral_spec({config, "preset mixtral-8x7b"});
}

float deviation(int64_t columns) {
  return 1.0f / std::sqrt(static_cast<float>(columns));
}

}  // namespace

SyntheticSource::SyntheticSource(const ModelSpec& spec, DType dtype, SliceEncoding experts,
                                 int64_t slice_width, uint64_t seed)
    : spec_(spec), dtype_(dtype), experts_(experts), slice_width_(slice_width), seed_(splitmix64(seed)) {}

uint64_t SyntheticSource::key_of(const TensorPart& part) const {
  return seed_ ^ splitmix64(fnv1a(part.name));
}

void SyntheticSource::read(const TensorPart& part, int64_t first, int64_t count, DType dtype,
                           void* to) const {
  if (part.columns == 0) {  // A norm's weight: 1 changes nothing.
    for (int64_t i = 0; i < count; ++i) {
      if (dtype == DType::fp32) {
        static_cast<float*>(to)[i] = 1;
      } else {
        static_cast<uint16_t*>(to)[i] = fp32_to_bf16(1);
      }
    }
    return;
  }
  generate(key_of(part), first, count, deviation(part.columns), dtype, to);
}

void SyntheticSource::read_expert(ExpertId expert, std::span<std::byte* const> slices) const {
  const int64_t matrix = slice_width_ * spec_.hidden;
  const float into = deviation(spec_.hidden);
  const float out_of = deviation(spec_.expert_ffn);
  const ExpertGrid grid{spec_.moe_layers(), spec_.experts, static_cast<int>(slices.size()), 0};
  for (int i = 0; i < static_cast<int>(slices.size()); ++i) {
    const uint64_t key = seed_ ^ splitmix64(~grid.index({expert.layer, expert.expert, i}));
    if (experts_ != SliceEncoding::dense) {
      draw_packed_slice(packed_slice_layout(experts_, spec_.hidden, slice_width_), key, into, out_of,
                        slices[i]);
      continue;
    }
    generate(key, 0, 2 * matrix, into, dtype_, slices[i]);
    generate(key, 2 * matrix, matrix, out_of, dtype_, slices[i] + 2 * matrix * dtype_size(dtype_));
  }
}

// Stacked parts are drawn as one matrix.
void SyntheticSource::read_packed_rows(const Weight& weight, SliceEncoding encoding, int64_t first,
                                       int64_t count, const PackedRowsTarget& to) const {
  const TensorPart& part = weight.parts.front();
  const int64_t row_bytes = encoding == SliceEncoding::int8 ? part.columns : part.columns / 2;
  const int64_t groups = part.columns / group_size(encoding);
  draw_packed_values(encoding, key_of(part), first * row_bytes, count * row_bytes, to.values);
  draw_packed_scales(encoding, key_of(part), first * groups, count * groups, deviation(part.columns),
                     to.scales, to.minimums);
}

void SyntheticSource::read_packed_slices(const Weight& gate_up, const Weight& down, const PackedWeight& form,
                                         int64_t first, int64_t count, std::byte* to) const {
  const PackedSliceLayout layout = packed_slice_layout(form.encoding, form.columns, form.slice_width);
  for (int64_t i = 0; i < count; ++i) {
    draw_packed_slice(layout, splitmix64(key_of(gate_up.parts.front()) + static_cast<uint64_t>(first + i)),
                      deviation(form.columns), deviation(down.parts.front().columns),
                      to + i * static_cast<int64_t>(layout.bytes));
  }
}

ModelSpec synthetic_spec(const std::string& name_or_config) {
  if (name_or_config == "scout") return scout();
  if (name_or_config == "llama-3.1-8b") return llama_3_1_8b();
  if (name_or_config == "mixtral-8x7b") return mixtral_8x7b();
  return read_spec(name_or_config);
}

}  // namespace lighter::models
