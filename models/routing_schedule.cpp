#include "models/routing_schedule.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace lighter::models {
namespace {

// SplitMix64 (Steele, Lea, Flood 2014): a step of thousands of tokens makes one for each token and layer.
class Engine {
 public:
  explicit Engine(uint64_t state) : state_(state) {}
  uint64_t operator()() { return mixed(state_ += kStep); }
  static uint64_t mixed(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
  }

 private:
  static constexpr uint64_t kStep = 0x9e3779b97f4a7c15;
  uint64_t state_;
};

Engine engine_for(uint64_t seed, int layer, int64_t position) {
  const uint64_t of_layer = Engine::mixed(seed + static_cast<uint64_t>(layer) + 1);
  return Engine(Engine::mixed(of_layer + static_cast<uint64_t>(position)));
}

// In [0, 1); the standard's distributions differ between libraries.
double unit(Engine& engine) {
  return static_cast<double>(engine() >> 11) * 0x1.0p-53;
}

// k draws without replacement, by weight.
void draw(Engine& engine, std::vector<double> weights, int k, int64_t* experts) {
  for (int i = 0; i < k; ++i) {
    double left = unit(engine) * std::accumulate(weights.begin(), weights.end(), 0.0);
    size_t chosen = 0;
    while (chosen + 1 < weights.size() && (weights[chosen] == 0 || left >= weights[chosen]))
      left -= weights[chosen++];
    while (weights[chosen] == 0) --chosen;  // Rounding may have passed the last one that is left.
    experts[i] = static_cast<int64_t>(chosen);
    weights[chosen] = 0;
  }
}

}  // namespace

RoutingSchedule uniform_schedule(int experts, int k, uint64_t seed) {
  return [=](int layer, int64_t position, int64_t* chosen) {
    Engine engine = engine_for(seed, layer, position);
    draw(engine, std::vector<double>(experts, 1.0), k, chosen);
  };
}

RoutingSchedule zipf_schedule(int experts, int k, int layers, double s, uint64_t seed) {
  std::vector<std::vector<double>> weights(layers, std::vector<double>(experts));
  for (int layer = 0; layer < layers; ++layer) {
    std::vector<int> order(experts);
    std::iota(order.begin(), order.end(), 0);
    Engine engine = engine_for(~seed, layer, 0);
    for (int i = experts - 1; i > 0; --i) std::swap(order[i], order[engine() % (i + 1)]);
    for (int rank = 0; rank < experts; ++rank) weights[layer][order[rank]] = std::pow(rank + 1.0, -s);
  }
  return [=](int layer, int64_t position, int64_t* chosen) {
    Engine engine = engine_for(seed, layer, position);
    draw(engine, weights[layer], k, chosen);
  };
}

RoutingSchedule recorded_schedule(std::vector<int32_t> routing, int64_t positions, int k) {
  auto shared = std::make_shared<const std::vector<int32_t>>(std::move(routing));
  return [=](int layer, int64_t position, int64_t* chosen) {
    const int32_t* from = shared->data() + (layer * positions + position) * k;
    std::copy_n(from, k, chosen);
  };
}

}  // namespace lighter::models
