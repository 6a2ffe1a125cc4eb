// Decoding one sequence, with whole models. On a GPU (LIGHTER_TEST_DEVICE=cuda) single tokens go through the
// CUDA graph; on the CPU the same promises are kept eagerly.
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "tests/models/small_checkpoint.h"

using namespace lighter;
using namespace lighter::test;

namespace {

using Miss = OffloadConfig::Miss;
using Policy = OffloadConfig::Policy;

// Workers that have died, which their owner finds out when it stops them.
class DeadWorkers : public MissWorkers {
 public:
  void start(const MissWork&, uint32_t) override {}
  void stop() override { throw DeviceError("worker 3 failed: out of luck"); }
  bool idle() const override { return true; }
  MissWorkersCounters counters() const override { return {}; }
  std::vector<MissSpan> latest_spans() const override { return {}; }
};

// Counts, in steps of one token, the layers whose experts were guessed at the layer with experts before it.
class RightGuesses : public models::RoutingObserver {
 public:
  int right = 0;

  const std::vector<int>& guess_depths() const override { return depths_; }
  void routed(int moe_layer, const Step& step, const at::Tensor&, const at::Tensor& experts) override {
    const auto expected = expected_.find(moe_layer);
    const auto chosen = sorted(experts);
    if (step.tokens.size() == 1 && expected != expected_.end()) {
      right += sorted(std::get<1>(expected->second.topk(static_cast<int64_t>(chosen.size()), -1))) == chosen;
    }
    expected_.clear();  // of a layer farther away, too
  }
  void guessed(int moe_layer, int, const at::Tensor& logits) override {
    if (logits.size(0) == 1) expected_[moe_layer] = logits.to(at::kFloat);
  }

 private:
  static std::vector<int64_t> sorted(const at::Tensor& experts) {
    const at::Tensor row = experts.cpu().to(at::kLong).contiguous();
    std::vector<int64_t> ids(row.const_data_ptr<int64_t>(), row.const_data_ptr<int64_t>() + row.numel());
    std::sort(ids.begin(), ids.end());
    return ids;
  }

  const std::vector<int> depths_ = {1, 2};
  std::map<int, at::Tensor> expected_;
};

// What the graph's kernels take: rows of 1024 values, heads of 64.
constexpr SmallSizes kDecodable{1024, 512, 1024, 64, 16, 4};

}  // namespace

TEST_CASE(
    "single tokens get the logits of eager decoding, and with slices read from host memory those of all "
    "resident ones "
    "bit for bit") {
  const bool cuda = test_device() == DeviceConfig::Kind::cuda;
  for (const std::string name : {"llama4_maverick", "mixtral"}) {
    const SmallCheckpoint checkpoint(name, kDecodable);
    const auto& spec = checkpoint.spec;
    const auto schedule = models::uniform_schedule(spec.experts, spec.experts_per_token, 5);
    const auto ids = some_ids(spec.vocab);
    for (const SliceEncoding format : {SliceEncoding::dense, SliceEncoding::int8, SliceEncoding::int4}) {
      CAPTURE(name);
      CAPTURE(encoding_name(format));
      Config config = checkpoint.config(DType::bf16);
      config.memory.gpu_budget_bytes = uint64_t{cuda ? 2048u : 256u} << 20;
      config.memory.host_budget_bytes = uint64_t{512} << 20;
      if (format != SliceEncoding::dense) set_format(config, format);
      ExpertCounters counters;
      const auto logits = [&](DecodeMode decode, double resident, Miss miss,
                              Policy policy = Policy::static_) {
        config.decode = decode;
        config.offload.resident = resident;
        config.offload.miss = miss;
        config.offload.policy = policy;
        LoadedModel model(config, schedule);
        if (cuda && decode == DecodeMode::graph) REQUIRE(model.model.why_eager == "");
        const auto result = model.mixed_logits(ids, 12, 9);
        counters = model.session.counters();
        return result;
      };
      const DecodeMode graph = cuda ? DecodeMode::graph : DecodeMode::automatic;
      const auto eager = logits(DecodeMode::eager, 1.0, Miss::automatic);
      const auto resident = logits(graph, 1.0, Miss::automatic);
      // The graph keeps its sums in fp32, eager decoding rounds them to bf16.
      CHECK(relative_error(resident, eager) < 0.03);
      // Residents that change behind the steps change no result.
      for (const Policy policy : {Policy::lru, Policy::lfu}) {
        CHECK(logits(graph, 0.5, cuda ? Miss::zero_copy : Miss::automatic, policy) == resident);
        CHECK(counters.evictions > 0);
      }
      for (const double ratio : {0.0, 0.5}) {
        CAPTURE(ratio);
        CHECK(logits(graph, ratio, cuda ? Miss::zero_copy : Miss::automatic) == resident);
        CHECK(logits(graph, ratio, Miss::fetch) == resident);
        if (cuda && format != SliceEncoding::dense) {
          for (const Miss miss : {Miss::cpu, Miss::split}) {
            CAPTURE(miss_name(miss));
            // Of the prompt's steps the CPU computes a part, too, in fp32, where the device rounds to bf16.
            CHECK(relative_error(logits(graph, ratio, miss), resident) < 0.02);
          }
        }
      }
    }
  }
}

TEST_CASE("single tokens get the logits of eager decoding, too, where the kernels for few keys end") {
  if (test_device() != DeviceConfig::Kind::cuda) return;  // there is no graph
  const SmallCheckpoint checkpoint("mixtral", kDecodable);
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < 1030; ++i) ids.push_back((i * i * 7 + 3 * i + 1) % checkpoint.spec.vocab);
  Config config = checkpoint.config(DType::bf16);
  config.memory.gpu_budget_bytes = uint64_t{2048} << 20;
  config.memory.host_budget_bytes = uint64_t{512} << 20;
  config.memory.context = 2048;
  // Of the positions that are decoded one by one.
  const auto logits = [&](DecodeMode decode) {
    config.decode = decode;
    const auto all = LoadedModel(config).mixed_logits(ids, 1018, 509);
    return std::vector<float>(all.begin() + 1018 * checkpoint.spec.vocab, all.end());
  };
  CHECK(relative_error(logits(DecodeMode::graph), logits(DecodeMode::eager)) < 0.03);
}

TEST_CASE(
    "the CPU's workers read ahead where the eager predictor would have been right about the next layer") {
  if (test_device() != DeviceConfig::Kind::cuda) return;  // there is no graph
  constexpr int64_t kPrompt = 12;
  for (const std::string name : {"llama4_maverick", "mixtral"}) {
    CAPTURE(name);
    const SmallCheckpoint checkpoint(name, kDecodable);
    const auto ids = some_ids(checkpoint.spec.vocab);
    Config config = checkpoint.config(DType::bf16);
    config.memory.gpu_budget_bytes = uint64_t{2048} << 20;
    config.memory.host_budget_bytes = uint64_t{512} << 20;
    set_format(config, SliceEncoding::int8);
    config.offload.resident = 0.5;
    config.offload.miss = Miss::cpu;
    config.offload.policy = Policy::static_;
    ExpertCounters counters;
    const auto logits = [&](bool prefetch) {
      config.offload.prefetch = {.enabled = prefetch, .depth = 1};
      config.decode = DecodeMode::graph;
      LoadedModel model(config);
      const auto result = model.mixed_logits(ids, kPrompt, kPrompt);
      counters = model.session.counters();
      return result;
    };
    const auto plain = logits(false);
    const auto decoded = static_cast<int64_t>(ids.size()) - kPrompt;
    CHECK(counters.cpu_layers == static_cast<uint64_t>(decoded * checkpoint.spec.moe_layers()));
    CHECK(counters.cpu_layers_expected == 0);
    CHECK(relative_error(logits(true), plain) < 0.02);
    const auto right = static_cast<double>(counters.cpu_layers_expected);
    config.decode = DecodeMode::eager;
    LoadedModel eager(config);
    RightGuesses guesses;
    eager.session.decoder().observe(&guesses);
    eager.mixed_logits(ids, kPrompt, kPrompt);
    MESSAGE(right, " of ", counters.cpu_layers, ", eagerly ", guesses.right);
    CHECK(guesses.right > 0);
    CHECK(right == doctest::Approx(guesses.right).epsilon(0.1));  // they round in different ways
  }
}

TEST_CASE("greedy steps give the same tokens whether or not the next one is enqueued before they end") {
  bool missing = false;
  SUBCASE("all experts resident") {}
  SUBCASE("half of them computed by the CPU") {
    missing = true;
  }
  const SmallCheckpoint checkpoint("mixtral", kDecodable);
  Config config = checkpoint.config(DType::bf16);
  config.memory.gpu_budget_bytes = uint64_t{2048} << 20;
  config.memory.host_budget_bytes = uint64_t{512} << 20;
  config.memory.context = 64;
  config.offload.resident = missing ? 0.5 : 1.0;
  if (missing) {
    set_format(config, SliceEncoding::int8);
    config.offload.policy = Policy::static_;
    if (test_device() == DeviceConfig::Kind::cuda) config.offload.miss = Miss::cpu;
  }
  LoadedModel model(config);
  Model& decoder = model.session.decoder();
  const auto prompt = some_ids(checkpoint.spec.vocab);
  const auto count = static_cast<int64_t>(prompt.size());
  // surprise: what follows the third of the model's own tokens is another one.
  const auto tokens = [&](bool goes_on, bool surprise) {
    decoder.release(0);
    Step first;
    first.add(0, 0, prompt.data(), count);
    std::vector<int64_t> ids = decoder.likeliest(first);
    for (int64_t position = count; position < config.memory.context; ++position) {
      int64_t next = ids.back();
      if (surprise && position == count + 2) next = (next + 1) % checkpoint.spec.vocab;
      Step step;
      step.add(0, position, &next, 1);
      step.goes_on = goes_on;  // beyond the context, too
      ids.push_back(decoder.likeliest(step).front());
    }
    return ids;
  };
  const auto one_by_one = tokens(false, false), surprised = tokens(false, true);
  CHECK(one_by_one != surprised);
  CHECK(tokens(true, false) == one_by_one);
  CHECK(tokens(true, true) == surprised);
  // A prompt, and logits, right after a step that would have gone on.
  decoder.release(0);
  Step half;
  half.add(0, 0, prompt.data(), count);
  int64_t next = decoder.likeliest(half).front();
  Step step;
  step.add(0, count, &next, 1);
  step.goes_on = true;
  decoder.likeliest(step);
  CHECK(tokens(true, false) == one_by_one);
}

TEST_CASE(
    "when the workers of a decode step have died, the step ends within a second with an error that says so") {
  if (test_device() != DeviceConfig::Kind::cuda) return;  // there is no graph
  const SmallCheckpoint checkpoint("mixtral", kDecodable);
  const auto ids = some_ids(checkpoint.spec.vocab);
  for (const auto& [miss, ahead] :
       {std::pair{Miss::cpu, false}, {Miss::split, false}, {Miss::fetch, false}, {Miss::split, true}}) {
    CAPTURE(miss_name(miss));
    CAPTURE(ahead);  // the next step is enqueued already
    Config config = checkpoint.config(DType::bf16);
    config.memory.gpu_budget_bytes = uint64_t{2048} << 20;
    config.memory.host_budget_bytes = uint64_t{512} << 20;
    set_format(config, SliceEncoding::int8);
    config.decode = DecodeMode::graph;
    config.offload.resident = 0.5;
    config.offload.miss = miss;
    if (ahead) config.offload.policy = Policy::static_;
    const cli::PreparedModel model = cli::prepare(config);
    cli::Session session(config, model, kNoProgress, {}, nullptr, std::make_unique<DeadWorkers>());
    const auto decode = [&](int64_t position, int64_t count) {
      Step step;
      step.add(0, position, ids.data() + position, count);
      step.goes_on = ahead;
      session.decoder().likeliest(step);
    };
    decode(0, 4);
    const auto begin = std::chrono::steady_clock::now();
    std::string message;
    try {
      decode(4, 1);
    } catch (const DeviceError& error) {
      message = error.what();
    }
    CHECK(std::chrono::steady_clock::now() - begin < std::chrono::seconds(1));
    CHECK(message == std::string("decoding stopped at layer 0: ") +
                         (miss == Miss::fetch ? "its missed experts" : "the CPU's share of its experts") +
                         " did not come within 500 ms; worker 3 failed: out of luck");
  }
}
