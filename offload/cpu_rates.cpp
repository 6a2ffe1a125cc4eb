#include "offload/cpu_rates.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "runtime/device/host_reading.h"
#include "runtime/error.h"

namespace lighter::offload {
namespace {

using Clock = std::chrono::steady_clock;

template <typename Body>
void on_threads(int threads, const Body& body) {
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i) all.emplace_back([&, i] { body(i); });
  for (auto& thread : all) thread.join();
}

}  // namespace

void fill_with_weights(std::byte* memory, uint64_t bytes, int threads) {
  auto* words = reinterpret_cast<uint64_t*>(memory);
  on_threads(threads, [&](int i) {
    uint64_t random = static_cast<uint64_t>(i);
    const uint64_t count = bytes / 8, last = count * (i + 1) / threads;
    for (uint64_t w = count * i / threads; w < last; ++w) {
      random = random * 6364136223846793005ull + 1442695040888963407ull;
      words[w] = (random ^ random >> 32) & 0x3F3F3F3F3F3F3F3Full;
    }
  });
}

double host_read_rate(const std::byte* memory, uint64_t bytes, int threads) {
  std::atomic<uint64_t> total = 0;
  std::atomic<int> ready = 0;
  std::atomic<int64_t> begin = 0;
  const uint64_t each = bytes / threads / 4096 * 4096;
  on_threads(threads, [&](int i) {
    for (++ready; ready < threads;) std::this_thread::yield();
    int64_t none = 0;
    begin.compare_exchange_strong(none, Clock::now().time_since_epoch().count());
    total += sum_of_words(memory + i * each, each);
  });
  const Clock::time_point from{Clock::duration(begin.load())};
  const double seconds = std::chrono::duration<double>(Clock::now() - from).count();
  // The sum is used, so that the reading is not left out.
  return total == 1 ? 0 : static_cast<double>(each) * threads / seconds * 1e-9;
}

SliceField::SliceField(std::byte* memory, uint64_t bytes, SliceEncoding encoding, int64_t hidden,
                       int64_t width)
    : kernel_(encoding, hidden, width),
      memory_(memory),
      stride_((kernel_.layout().bytes + 4095) / 4096 * 4096),
      count_(bytes / stride_) {
  if (count_ == 0) throw CapacityError("no slice fits into " + std::to_string(bytes) + " bytes");
  const auto& layout = kernel_.layout();
  const uint64_t scales_at = layout[SliceMatrix::gate].scales_at;
  for (uint64_t i = 0; i < count_; ++i) {  // scales and minima of 2^-7
    auto* halves = reinterpret_cast<uint16_t*>(memory + i * stride_ + scales_at);
    std::fill_n(halves, (layout.bytes - scales_at) / 2, uint16_t{0x2000});
  }
}

double cpu_experts_rate(CpuExperts& cpu, const SliceField& field, int tokens,
                        const std::function<bool()>& go_on) {
  // As many as a few layers miss at a time, so that waking the workers counts for little.
  const uint64_t batch = std::min<uint64_t>(64, field.slices());
  const std::vector<float> x(static_cast<size_t>(tokens * field.kernel().layout().hidden), 0.5f);
  std::vector<float> result(x.size());
  std::vector<TokenUse> uses;
  for (int token = 0; token < tokens; ++token) uses.push_back({token, 0.5f, 1});
  const SliceColumns all{0, field.kernel().layout().width};
  CpuJobs jobs;
  double bytes = 0;
  const auto run = [&](uint64_t first) {
    jobs.clear(field.kernel());
    const int expert = jobs.add_expert(uses);
    for (uint64_t i = 0; i < batch; ++i) jobs.add_job(expert, field.slice(first + i), all);
    cpu.run(jobs, x.data(), tokens, result.data());
  };
  run(0);  // the first one wakes the workers and takes memory
  const auto begin = Clock::now();
  for (uint64_t first = batch; bytes == 0 || go_on(); first += batch) {
    run(first);
    bytes += static_cast<double>(jobs.weight_bytes());
  }
  return bytes / std::chrono::duration<double>(Clock::now() - begin).count() * 1e-9;
}

}  // namespace lighter::offload
