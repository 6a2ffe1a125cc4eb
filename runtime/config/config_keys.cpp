#include "runtime/config/config_keys.h"

#include <algorithm>
#include <charconv>
#include <limits>

#include "runtime/bytes.h"
#include "runtime/config/edit_distance.h"

namespace lighter {
namespace {

using nlohmann::json;
using namespace forms;

ValueForm bytes() {
  return text("a size above 0 with a unit (B, KB, KiB, MB, MiB, GB, GiB, TB, TiB), such as 78GiB",
              R"(^[0-9]{1,18}(\.[0-9]{1,6})? ?(B|[KMGT]i?B)$)",
              [](std::string_view value) { return parse_bytes(value).value_or(0) > 0; });
}

constexpr double kMaxZipf = 10;

// The exponent of "zipf:S"; nothing for another schedule and for an exponent out of range.
std::optional<double> zipf_exponent(std::string_view schedule) {
  if (!schedule.starts_with("zipf:")) return std::nullopt;
  schedule.remove_prefix(5);
  double s = 0;
  std::from_chars(schedule.data(), schedule.data() + schedule.size(), s);
  if (!(s > 0 && s <= kMaxZipf)) return std::nullopt;
  return s;
}

ValueForm schedule() {
  return text("router, uniform, or zipf:S with S above 0 and at most 10, such as zipf:1.1",
              R"(^(router|uniform|zipf:[0-9]{1,2}(\.[0-9]{1,9})?)$)", [](std::string_view value) {
                return !value.starts_with("zipf:") || zipf_exponent(value).has_value();
              });
}

// A regular expression for an index set.
const std::string kIndexSet = R"((\*|[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*))";

ValueForm pin() {
  const std::string& set = kIndexSet;
  return text("LAYERS/EXPERTS, each a number, a range, a comma list or *, such as \"0-3/*\" or \"7/2,5\"",
              "^" + set + "/" + set + "$",
              [](std::string_view value) { return parse_pin(value).has_value(); });
}

ValueForm formats() {
  return words({"dtype", "int8", "int4"});
}

ValueForm formats_by_layer() {
  return map_of(
      "layers (a number, a range, a comma list, or \"*\" for what is left), such as {\"*\": int8, "
      "\"0-1,47\": dtype},",
      "^" + kIndexSet + "$", [](std::string_view key) { return parse_index_set(key).has_value(); },
      [](std::string_view key, std::string_view other) -> std::string {
        if (key == "*" || other == "*" || !parse_index_set(key)->overlaps(*parse_index_set(other))) return "";
        return "'" + std::string(other) + "' and '" + std::string(key) + "' overlap; name each layer once";
      },
      formats());
}

DeviceConfig parse_device(const std::string& value) {
  if (value == "cpu") return {DeviceConfig::Kind::cpu, 0};
  const size_t colon = value.find(':');
  return {DeviceConfig::Kind::cuda, colon == value.npos ? 0 : std::stoi(value.substr(colon + 1))};
}

RoutingConfig::Schedule parse_schedule(const std::string& value) {
  if (value == "router") return RoutingConfig::Schedule::router;
  return value == "uniform" ? RoutingConfig::Schedule::uniform : RoutingConfig::Schedule::zipf;
}

OffloadConfig::Policy parse_policy(const std::string& value) {
  if (value == "static") return OffloadConfig::Policy::static_;
  return value == "lru" ? OffloadConfig::Policy::lru : OffloadConfig::Policy::lfu;
}

constexpr const char* kMisses[] = {"auto", "fetch", "zero_copy", "cpu", "split"};  // as enumerated

OffloadConfig::Miss parse_miss(const std::string& value) {
  return static_cast<OffloadConfig::Miss>(std::find(std::begin(kMisses), std::end(kMisses), value) -
                                          std::begin(kMisses));
}

DecodeMode parse_decode(const std::string& value) {
  if (value == "graph") return DecodeMode::graph;
  return value == "eager" ? DecodeMode::eager : DecodeMode::automatic;
}

SliceEncoding parse_encoding(const std::string& value) {
  if (value == "int8") return SliceEncoding::int8;
  return value == "int4" ? SliceEncoding::int4 : SliceEncoding::dense;
}

LayerFormats parse_layer_formats(const json& value) {
  LayerFormats formats;
  if (value.is_string()) {
    formats.others = parse_encoding(value.get<std::string>());
    return formats;
  }
  for (const auto& [layers, word] : value.items()) {
    const SliceEncoding encoding = parse_encoding(word.get<std::string>());
    if (layers == "*") {
      formats.others = encoding;
    } else {
      formats.rules.push_back({*parse_index_set(layers), encoding});
    }
  }
  return formats;
}

Resident parse_resident(const json& value) {
  if (value.is_number()) return value.get<double>();
  if (value.is_array()) return value.get<std::vector<double>>();
  return ResidentAuto{};
}

// For keys that are "auto" or a count.
int64_t count_or_auto(const json& value) {
  return value.is_string() ? 0 : value.get<int64_t>();
}

std::vector<ConfigKey> make_keys() {
  constexpr uint64_t kAnySeed = std::numeric_limits<uint64_t>::max();
  constexpr uint64_t kMaxTokens = 10'485'760;  // the longest context of Llama 4
  const json none;
  // path, description, forms, default, required, assign
  return {
      {"model.path",
       "Hugging Face checkpoint folder; a relative one is relative to this file.",
       {text("the path of a checkpoint folder")},
       none,
       false,
       [](Config& c, const json& v) { c.model.path = v.get<std::string>(); }},
      {"model.synthetic",
       "Seeded random weights of exact shapes instead of a checkpoint: scout, llama-3.1-8b, mixtral-8x7b, or "
       "the path of a config.json. For benchmarks; the text is noise.",
       {words({"scout", "llama-3.1-8b", "mixtral-8x7b"}), text("the path of a .json file", R"(\.json$)")},
       none,
       false,
       [](Config& c, const json& v) { c.model.synthetic = v.get<std::string>(); }},
      {"model.dtype",
       "The type that weights are held in and the model computes in.",
       {words({"bf16", "fp32"})},
       "bf16",
       false,
       [](Config& c, const json& v) { c.model.dtype = v == "bf16" ? DType::bf16 : DType::fp32; }},
      {"model.format",
       "The format of experts, shared, attention and head where they are not set: as dtype says, or "
       "quantized "
       "while they are loaded (int8 in groups of 128, int4 in groups of 64). Router, norms and embedding "
       "stay in "
       "dtype.",
       {formats()},
       "dtype",
       false,
       [](Config& c, const json& v) {
         c.model.format = parse_encoding(v.get<std::string>());
         c.model.experts = c.model.head = c.model.format;
         c.model.shared = c.model.attention = {c.model.format, {}};
       }},
      {"model.experts",
       "The format of the routed experts. Default: model.format.",
       {formats()},
       none,
       false,
       [](Config& c, const json& v) { c.model.experts = parse_encoding(v.get<std::string>()); }},
      {"model.shared",
       "The format of the shared experts and of dense FFN layers: one, or one for each of some layers. "
       "Default: "
       "model.format; dtype for layers that a map leaves out.",
       {formats(), formats_by_layer()},
       none,
       false,
       [](Config& c, const json& v) { c.model.shared = parse_layer_formats(v); }},
      {"model.attention",
       "The format of the attention's q, k, v and o: one, or one for each of some layers. Default: "
       "model.format; "
       "dtype for layers that a map leaves out.",
       {formats(), formats_by_layer()},
       none,
       false,
       [](Config& c, const json& v) { c.model.attention = parse_layer_formats(v); }},
      {"model.head",
       "The format of the head. Default: model.format. A head that is the embedding too must stay in dtype.",
       {formats()},
       none,
       false,
       [](Config& c, const json& v) { c.model.head = parse_encoding(v.get<std::string>()); }},
      {"model.layers",
       "Keep only the first so many layers. Only with model.synthetic.",
       {integer(1, 9999)},
       none,
       false,
       [](Config& c, const json& v) { c.model.layers = v.get<int>(); }},
      {"model.seed",
       "Seed of the weights. Only with model.synthetic.",
       {integer(0, kAnySeed)},
       0,
       false,
       [](Config& c, const json& v) { c.model.seed = v.get<uint64_t>(); }},

      {"device",
       "Where the model computes: cpu, cuda (the first GPU) or cuda:N.",
       {text("cpu, cuda or cuda:N", "^(cpu|cuda(:[0-9]{1,3})?)$")},
       "cuda:0",
       false,
       [](Config& c, const json& v) { c.device = parse_device(v.get<std::string>()); }},
      {"decode",
       "How a token is decoded: graph, one CUDA graph a token, without the host in between; eager, one "
       "operation "
       "after the other; auto takes the graph where the model and the device allow.",
       {words({"auto", "graph", "eager"})},
       "auto",
       false,
       [](Config& c, const json& v) { c.decode = parse_decode(v.get<std::string>()); }},

      {"memory.gpu_budget",
       "Hard limit of device memory, CUDA context and load peak included, such as 78GiB. On device cpu it "
       "bounds the arena that stands in for the GPU's memory.",
       {bytes()},
       none,
       true,
       [](Config& c, const json& v) { c.memory.gpu_budget_bytes = *parse_bytes(v.get<std::string>()); }},
      {"memory.host_budget",
       "Hard limit of host memory, such as 110GiB.",
       {bytes()},
       none,
       true,
       [](Config& c, const json& v) { c.memory.host_budget_bytes = *parse_bytes(v.get<std::string>()); }},
      {"memory.context",
       "Tokens, prompt and answer together, that the KV cache has room for.",
       {integer(1, kMaxTokens)},
       8192,
       false,
       [](Config& c, const json& v) { c.memory.context = v.get<int64_t>(); }},
      {"memory.prefill_chunk",
       "Prompt tokens computed in one step: auto or a count.",
       {words({"auto"}), integer(1, kMaxTokens)},
       "auto",
       false,
       [](Config& c, const json& v) { c.memory.prefill_chunk = count_or_auto(v); }},
      {"memory.kv_block",
       "Tokens in one block of the KV cache.",
       {one_of_integers({16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192})},
       256,
       false,
       [](Config& c, const json& v) { c.memory.kv_block = v.get<int64_t>(); }},
      {"memory.sequences",
       "Sequences that the KV cache has room for at once, each of them with the whole context. `lighter run` "
       "uses "
       "one, `lighter bench` as many as its batch.",
       {integer(1, 4096)},
       1,
       false,
       [](Config& c, const json& v) { c.memory.sequences = v.get<int>(); }},

      {"offload.resident",
       "Share of the expert slices that starts in device memory: auto (what fits), a ratio from 0 to 1, or "
       "a list with one ratio per layer.",
       {words({"auto"}), number(0, 1), list_of(number(0, 1))},
       "auto",
       false,
       [](Config& c, const json& v) { c.offload.resident = parse_resident(v); }},
      {"offload.policy",
       "Which slice makes room for another: none (static), the least recently or the least "
       "frequently used.",
       {words({"static", "lru", "lfu"})},
       "lru",
       false,
       [](Config& c, const json& v) { c.offload.policy = parse_policy(v.get<std::string>()); }},
      {"offload.miss",
       "How a decoded token gets at slices that are not resident: fetch copies them to the device, zero_copy "
       "lets "
       "the GPU read them where they are, cpu has the CPU compute them, and split divides them between "
       "zero_copy and "
       "cpu so that both end together. auto is split where it can be, else zero_copy, and fetch without a "
       "graph.",
       {words({std::begin(kMisses), std::end(kMisses)})},
       "auto",
       false,
       [](Config& c, const json& v) { c.offload.miss = parse_miss(v.get<std::string>()); }},
      {"offload.pin",
       "Experts that stay in device memory: LAYERS/EXPERTS, such as \"0-3/*\" or \"7/2,5\".",
       {list_of(pin())},
       json::array(),
       false,
       [](Config& c, const json& v) {
         for (const json& item : v) c.offload.pin.push_back(*parse_pin(item.get<std::string>()));
       }},
      {"offload.prefetch.enabled",
       "Fetch the experts that coming layers probably need; beside the decode graph, let the CPU read them "
       "ahead.",
       {boolean()},
       true,
       false,
       [](Config& c, const json& v) { c.offload.prefetch.enabled = v.get<bool>(); }},
      {"offload.prefetch.depth",
       "How many layers ahead are predicted; beside the decode graph it is always the next one with experts.",
       {integer(1, 8)},
       1,
       false,
       [](Config& c, const json& v) { c.offload.prefetch.depth = v.get<int>(); }},
      {"offload.near_pages",
       "Time the pages of host memory while the experts load, and have what the CPU computes in those that "
       "it "
       "reads fastest. Takes some seconds, and while it looks for such pages up to the host budget.",
       {boolean()},
       true,
       false,
       [](Config& c, const json& v) { c.offload.near_pages = v.get<bool>(); }},
      {"offload.slice_width",
       "FFN columns in one slice of an expert: auto or a count.",
       {words({"auto"}), integer(1, 1'048'576)},
       "auto",
       false,
       [](Config& c, const json& v) { c.offload.slice_width = count_or_auto(v); }},
      {"offload.routing.schedule",
       "Who chooses the experts: the model's router, or, only with model.synthetic, a seeded schedule "
       "(uniform, zipf:S).",
       {schedule()},
       "router",
       false,
       [](Config& c, const json& v) {
         const auto value = v.get<std::string>();
         c.offload.routing.schedule = parse_schedule(value);
         c.offload.routing.zipf_s = zipf_exponent(value).value_or(0);
       }},
      {"offload.routing.seed",
       "Seed of the schedule.",
       {integer(0, kAnySeed)},
       0,
       false,
       [](Config& c, const json& v) { c.offload.routing.seed = v.get<uint64_t>(); }},

      {"cpu.threads",
       "Threads that compute on the CPU: auto (one per core) or a count.",
       {words({"auto"}), integer(1, 4096)},
       "auto",
       false,
       [](Config& c, const json& v) { c.cpu.threads = static_cast<int>(count_or_auto(v)); }},

      {"generate.max_tokens",
       "At most so many new tokens.",
       {integer(1, kMaxTokens)},
       256,
       false,
       [](Config& c, const json& v) { c.generate.max_tokens = v.get<int64_t>(); }},
      {"generate.temperature",
       "0 takes the likeliest token; higher is more varied.",
       {number(0, 100)},
       0.0,
       false,
       [](Config& c, const json& v) { c.generate.temperature = v.get<double>(); }},
      {"generate.top_k",
       "Sample from the k likeliest tokens only.",
       {integer(1, 10'000'000)},
       none,
       false,
       [](Config& c, const json& v) { c.generate.top_k = v.get<int>(); }},
      {"generate.top_p",
       "Sample from the likeliest tokens that together have this probability.",
       {number_above(0, 1)},
       none,
       false,
       [](Config& c, const json& v) { c.generate.top_p = v.get<double>(); }},
      {"generate.min_p",
       "Drop tokens less probable than this share of the likeliest one's probability.",
       {number(0, 1)},
       none,
       false,
       [](Config& c, const json& v) { c.generate.min_p = v.get<double>(); }},
      {"generate.seed",
       "Seed of the sampler; without one every run differs.",
       {integer(0, kAnySeed)},
       none,
       false,
       [](Config& c, const json& v) { c.generate.seed = v.get<uint64_t>(); }},
      {"generate.stop",
       "Texts that end the answer; they are not part of it.",
       {list_of(text("a text that is not empty"))},
       json::array(),
       false,
       [](Config& c, const json& v) { c.generate.stop = v.get<std::vector<std::string>>(); }},
      {"generate.ignore_eos",
       "Go on after the model's end-of-text tokens.",
       {boolean()},
       false,
       false,
       [](Config& c, const json& v) { c.generate.ignore_eos = v.get<bool>(); }},
  };
}

std::string_view last_part(std::string_view path) {
  return path.substr(path.rfind('.') + 1);
}

}  // namespace

const char* miss_name(OffloadConfig::Miss miss) {
  return kMisses[static_cast<size_t>(miss)];
}

const std::vector<ConfigKey>& config_keys() {
  static const std::vector<ConfigKey> keys = make_keys();
  return keys;
}

const std::vector<ConfigSection>& config_sections() {
  static const std::vector<ConfigSection> sections{
      {"", "Settings of lighter run and lighter plan."},
      {"model", "What to run: exactly one of path and synthetic."},
      {"memory", "Hard budgets and the room for tokens."},
      {"offload", "Which experts are in device memory, and how the others get there."},
      {"offload.prefetch", "Fetching ahead of the router."},
      {"offload.routing", "Who chooses the experts."},
      {"cpu", "The host's cores."},
      {"generate", "How text is made, unless the command line says otherwise."}};
  return sections;
}

const ConfigKey* find_key(std::string_view path) {
  for (const ConfigKey& key : config_keys()) {
    if (key.path == path) return &key;
  }
  return nullptr;
}

const ConfigSection* find_section(std::string_view path) {
  for (const ConfigSection& section : config_sections()) {
    if (section.path == path) return &section;
  }
  return nullptr;
}

NearestKey nearest_key(std::string_view unknown) {
  // Nobody mistypes a longer name than this; it bounds the work on hostile input.
  unknown = unknown.substr(0, 200);
  std::string nearest;
  size_t best = std::numeric_limits<size_t>::max();
  const auto consider = [&](const std::string& path) {
    if (path.empty()) return;
    // The section costs one, so that of two keys with the same last part the one in this section wins.
    const size_t distance =
        std::min(edit_distance(unknown, path), edit_distance(last_part(unknown), last_part(path)) + 1);
    if (distance < best) {
      best = distance;
      nearest = path;
    }
  };
  for (const ConfigKey& key : config_keys()) consider(key.path);
  for (const ConfigSection& section : config_sections()) consider(section.path);
  return {nearest, best <= 1 + last_part(unknown).size() / 3};
}

}  // namespace lighter
