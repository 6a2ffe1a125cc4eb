// How fast the CPU's experts read weights, beside what the machine's memory delivers. Needs no GPU: a thread
// plays its part, posting Scout's 48 layers to the mailbox and waiting for each.
//   cpu_experts_bench [GiB of weights, 8] [threads, all cores but one] [KiB asked for ahead ...]
// Before, gate and up, and down, by themselves: one thread whose weights are in its cache, all threads each
// of which has them in its own, and all threads from memory. With several distances of prefetching, the rows
// that they matter for are printed for each; else also what of a layer's time goes with its bytes, and what
// does not. Where memory differs, the weights are in pages near the processor.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "offload/cpu_experts.h"
#include "offload/cpu_rates.h"
#include "offload/spin_barrier.h"
#include "runtime/device/device.h"
#include "runtime/device/host_memory.h"
#include "runtime/device/near_pages.h"
#include "runtime/error.h"

namespace {

using namespace lighter;
using namespace lighter::offload;
using Clock = std::chrono::steady_clock;

constexpr int64_t kHidden = 5120;
constexpr int kLayers = 48;
constexpr double kSecondsEach = 0.6;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// Its last `bytes` are near.
Buffer filled_memory(Device& device, uint64_t bytes, int threads) {
  const auto others = static_cast<uint64_t>(static_cast<double>(bytes) * kFarShare / (1 - kFarShare));
  const uint64_t all = bytes + others / kHugePage * kHugePage;
  try {
    Buffer memory = std::move(device.allocate_host_parts({{all}}, "weights", true, kNoProgress).front());
    fill_with_weights(memory.data() + all - bytes, bytes, threads);
    return memory;
  } catch (const CapacityError& error) {
    std::fprintf(stderr, "%s\ngive a smaller number of GiB\n", error.what());
    std::exit(1);
  }
}

// GB/s; the better of two runs.
double read_rate(const std::byte* memory, uint64_t bytes, int threads) {
  return std::max(host_read_rate(memory, bytes, threads), host_read_rate(memory, bytes, threads));
}

// Returns the median of layer_us.
double print_row(const std::string& what, std::vector<double> layer_us, double bytes, double best_rate,
                 double waited = -1) {
  std::sort(layer_us.begin(), layer_us.end());
  double sum = 0;
  for (const double us : layer_us) sum += us;
  const double rate = bytes / sum * 1e-3, median = layer_us[layer_us.size() / 2];
  std::printf("  %-38s %7.0f %7.0f %8.1f %6.0f %%", what.c_str(), median,
              layer_us[layer_us.size() * 99 / 100], rate, 100 * rate / best_rate);
  if (waited >= 0) std::printf(" %6.1f %%", 100 * waited);
  std::printf("\n");
  std::fflush(stdout);
  return median;
}

std::vector<float> random_values(int64_t count) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// Decode of `tokens` tokens that all chose the same expert: jobs_least to jobs_most slices a layer. Returns
// the median of a layer's time, in µs.
double bench_polling(const std::string& what, CpuExperts& cpu, const SliceField& weights, int tokens,
                     uint64_t jobs_least, uint64_t jobs_most, double best_rate) {
  const SliceEncoding encoding = weights.kernel().layout().encoding;
  const MissMailboxShape shape{kLayers, tokens, kHidden, 1, group_size(encoding)};
  std::vector<std::byte> memory(MissMailbox::bytes(shape) + 128);
  const MissMailbox mailbox(memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128), shape);
  std::mt19937 random(1);
  for (int layer = 0; layer < kLayers; ++layer) {
    const MissSlot slot = mailbox.slot(layer);
    std::generate_n(slot.x, tokens * kHidden, [&] { return static_cast<int8_t>(random() % 255 - 127); });
    std::fill_n(slot.x_scales, tokens * kHidden / shape.group, 1 / 127.0f);
    std::fill_n(slot.factors, tokens, 1.0f);
    *slot.tokens = tokens;
  }
  const auto make_jobs = [&](int layer, const MissPost& post, CpuJobs& jobs) {
    jobs.clear(weights.kernel());
    TokenUse uses[16];
    for (int t = 0; t < tokens; ++t) uses[t] = {t, 0.5f, 1};
    const int expert = jobs.add_expert({uses, static_cast<size_t>(tokens)});
    const uint64_t count = jobs_least + layer % (jobs_most - jobs_least + 1);
    const uint64_t first = (uint64_t{post.step} * kLayers + layer) * jobs_most;
    for (uint64_t i = 0; i < count; ++i) {
      jobs.add_job(expert, weights.slice(first + i), {0, weights.kernel().layout().width});
    }
  };
  cpu.start_polling(mailbox, make_jobs, 1);
  const auto before = cpu.counters();
  std::vector<double> layer_us;
  const auto begin = Clock::now();
  for (uint32_t step = 1; step < 3 || seconds_since(begin) < kSecondsEach; ++step) {
    for (int layer = 0; layer < kLayers; ++layer) {
      const MissSlot slot = mailbox.slot(layer);
      const auto posted = Clock::now();
      std::atomic_ref(*slot.posted).store(step, std::memory_order_release);
      const std::atomic_ref done(*slot.done);
      for (uint32_t turns = 0; done.load(std::memory_order_acquire) != step;) spin(turns);
      layer_us.push_back(1e6 * seconds_since(posted));
    }
  }
  cpu.stop_polling();
  const auto after = cpu.counters();
  const double busy = std::max(after.busy_s - before.busy_s, 1e-9);
  return print_row(what, layer_us, static_cast<double>(after.bytes - before.bytes), best_rate,
                   (after.waited_s - before.waited_s) / busy);
}

// The line through the times of layers of few slices, by least squares.
void bench_parts(const std::string& what, CpuExperts& cpu, const SliceField& weights, double best_rate) {
  double n = 0, x_sum = 0, y_sum = 0, xx_sum = 0, xy_sum = 0;
  for (const uint64_t slices : {2, 4, 6, 12}) {
    const double x = static_cast<double>(slices * weights.kernel().layout().bytes);
    const double y = bench_polling(what + ", decode, " + std::to_string(slices) + " slices", cpu, weights, 1,
                                   slices, slices, best_rate);
    ++n;
    x_sum += x;
    y_sum += y;
    xx_sum += x * x;
    xy_sum += x * y;
  }
  const double us_per_byte = (n * xy_sum - x_sum * y_sum) / (n * xx_sum - x_sum * x_sum);
  std::printf("  %s: %.1f us a layer, and its bytes at %.1f GB/s\n", what.c_str(),
              (y_sum - us_per_byte * x_sum) / n, 1e-3 / us_per_byte);
}

// 16 experts of 4 slices, chosen by `uses` tokens each.
void bench_batch(const std::string& what, CpuExperts& cpu, const SliceField& weights, int uses,
                 double best_rate) {
  const int64_t tokens = 16 * uses;
  const auto x = random_values(tokens * kHidden);
  std::vector<float> result(x.size());
  CpuJobs jobs;
  double bytes = 0;
  std::vector<double> layer_us;
  const auto begin = Clock::now();
  for (uint64_t slice = 0; layer_us.size() < 3 || seconds_since(begin) < kSecondsEach;) {
    jobs.clear(weights.kernel());
    for (int expert = 0; expert < 16; ++expert) {
      std::vector<TokenUse> chosen;
      for (int i = 0; i < uses; ++i) chosen.push_back({i * 16 + expert, 0.5f, 1});
      const int id = jobs.add_expert(chosen);
      for (int i = 0; i < 4; ++i)
        jobs.add_job(id, weights.slice(slice++), {0, weights.kernel().layout().width});
    }
    bytes += static_cast<double>(jobs.weight_bytes());
    const auto started = Clock::now();
    cpu.run(jobs, x.data(), tokens, result.data());
    layer_us.push_back(1e6 * seconds_since(started));
  }
  print_row(what, layer_us, bytes, best_rate);
}

// One half of an expert, of one slice after another, by a thread.
class Half : public PrefetchSource {
 public:
  // cached: the same rows of one slice again and again, which stay in the second-level cache.
  Half(const SliceField& weights, bool down, bool cached, int tokens, uint64_t first_slice)
      : weights_(weights),
        down_(down),
        tokens_(tokens),
        next_(first_slice),
        prefetched_(first_slice),
        step_(!cached) {
    const auto& layout = weights.kernel().layout();
    rows_ = down ? layout.hidden : layout.width;
    if (cached) rows_ /= 8;
    const auto x = random_values(tokens * layout.hidden);
    weights.kernel().quantize_input(x.data(), tokens, input_);
    weights.kernel().quantize_hidden(x.data(), tokens, hidden_);
    out_.resize(static_cast<size_t>(tokens) * std::max(layout.hidden, layout.width));
    ahead_ = PrefetchStream(*this);
    ahead_.ask_bytes(weights.kernel().prefetch_distance(tokens, cpu_kernels::kPrefetchBytes));
  }
  // Of weights.
  double bytes() const {
    const auto& layout = weights_.kernel().layout();
    return static_cast<double>(layout.bytes) * (down_ ? 1 : 2) / 3 * static_cast<double>(rows_) /
           static_cast<double>(down_ ? layout.hidden : layout.width);
  }
  void run() {
    const CpuSliceKernel& kernel = weights_.kernel();
    const std::byte* const slice = weights_.slice(next_);
    next_ += step_;
    if (down_) {
      kernel.down(slice, {0, kernel.layout().width}, {hidden_, nullptr, tokens_}, 0, rows_,
                  {out_.data(), kernel.layout().hidden, nullptr, nullptr}, ahead_);
    } else {
      kernel.gate_up(slice, {input_, nullptr, tokens_}, 0, rows_, out_.data(), kernel.layout().width, ahead_);
    }
  }
  std::span<const PrefetchRange> more() override {
    const CpuSliceKernel& kernel = weights_.kernel();
    const std::byte* const slice = weights_.slice(prefetched_);
    prefetched_ += step_;
    ranges_.clear();
    if (down_) {
      ranges_.push_back(kernel.down_range(slice, {0, kernel.layout().width}, 0, rows_));
    } else {
      kernel.add_gate_up_ranges(slice, 0, rows_, ranges_);
    }
    return ranges_;
  }

 private:
  const SliceField& weights_;
  const bool down_;
  const int64_t tokens_;
  int64_t rows_ = 0;
  uint64_t next_, prefetched_, step_;
  QuantizedActivations input_, hidden_;
  std::vector<float> out_;
  std::vector<PrefetchRange> ranges_;
  PrefetchStream ahead_;
};

// The halves by themselves, without barriers: GB/s of all threads.
double half_rate(const SliceField& weights, bool down, bool cached, int tokens, int threads) {
  std::atomic<int> ready = 0;
  std::vector<double> rates(threads);
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i) {
    all.emplace_back([&, i] {
      Half half(weights, down, cached, tokens, weights.slices() * i / threads);
      half.run();
      for (++ready; ready < threads;) std::this_thread::yield();
      const auto begin = Clock::now();
      double bytes = 0;
      while (seconds_since(begin) < kSecondsEach / 2) {
        half.run();
        bytes += half.bytes();
      }
      rates[i] = bytes / seconds_since(begin) * 1e-9;
    });
  }
  double sum = 0;
  for (int i = 0; i < threads; ++i) {
    all[i].join();
    sum += rates[i];
  }
  return sum;
}

void bench_halves(std::byte* memory, uint64_t bytes, int threads, double best_rate) {
  std::printf("  %-38s %8s %8s %8s %8s\n", "halves of an expert alone, GB/s", "a cache", "caches", "memory",
              "of read");
  for (const auto encoding : {SliceEncoding::int8, SliceEncoding::int4}) {
    const SliceField weights(memory, bytes, encoding, kHidden, 512);
    for (const int tokens : {1, 4}) {
      for (const bool down : {false, true}) {
        const double one_cached = half_rate(weights, down, true, tokens, 1);
        const double cached = half_rate(weights, down, true, tokens, threads);
        const double read = half_rate(weights, down, false, tokens, threads);
        char what[64];
        std::snprintf(what, sizeof what, "%s, %s, %d token%s", encoding_name(encoding).data(),
                      down ? "down" : "gate and up", tokens, tokens > 1 ? "s" : "");
        std::printf("  %-38s %8.1f %8.1f %8.1f %6.0f %%\n", what, one_cached, cached, read,
                    100 * read / best_rate);
        std::fflush(stdout);
      }
    }
  }
}

void bench_encoding(SliceEncoding encoding, CpuExperts& cpu, std::byte* memory, uint64_t bytes, bool all,
                    double best_rate) {
  const auto row = [&](const std::string& what) {
    return std::string(encoding_name(encoding)) + ", " + what;
  };
  for (const int64_t width : {256, 512}) {
    const SliceField weights(memory, bytes, encoding, kHidden, width);
    char size[32];
    std::snprintf(size, sizeof size, "7-11 x %.1f MB",
                  static_cast<double>(weights.kernel().layout().bytes) * 1e-6);
    bench_polling(row(std::string("decode, ") + size), cpu, weights, 1, 7, 11, best_rate);
  }
  const SliceField weights(memory, bytes, encoding, kHidden, 256);
  if (all) {
    bench_parts(std::string(encoding_name(encoding)), cpu, weights, best_rate);
    bench_polling(row("decode, no slices"), cpu, weights, 1, 0, 0, best_rate);
    bench_polling(row("decode of 4 tokens, 7-11"), cpu, weights, 4, 7, 11, best_rate);
    bench_batch(row("batch, 64 slices x 1 token"), cpu, weights, 1, best_rate);
  }
  bench_batch(row("batch, 64 slices x 4 tokens"), cpu, weights, 4, best_rate);
  bench_batch(row("batch, 64 slices x 16 tokens"), cpu, weights, 16, best_rate);
}

}  // namespace

int main(int count, char** arguments) {
  const double gib = count > 1 ? std::atof(arguments[1]) : 8;
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  CpuExpertsOptions options;
  options.threads = count > 2 ? std::atoi(arguments[2]) : 0;
  options.expert_width = 11 * 512;
  std::vector<int64_t> distances;
  for (int i = 3; i < count; ++i) distances.push_back(std::atoi(arguments[i]) * int64_t{1024});
  const bool bad = std::any_of(distances.begin(), distances.end(), [](int64_t bytes) { return bytes <= 0; });
  if (gib < 0.1 || options.threads < 0 || bad) {
    std::fprintf(stderr,
                 "usage: cpu_experts_bench [GiB of weights, 8] [threads, all cores but one] "
                 "[KiB asked for ahead ...]\n");
    return 2;
  }
  const auto bytes = static_cast<uint64_t>(gib * 512) << 21;
  const auto device = make_cpu_device(0, std::max(3 * bytes, machine_memory_bytes() / 2));
  const Buffer buffer = filled_memory(*device, bytes, cores);
  std::byte* const memory = buffer.data() + buffer.bytes() - bytes;
  const int threads = CpuExperts(options).threads();

  std::printf("%d cores, %d threads, %s, %.1f GiB\n", cores, threads,
              path_name(supported_cpu_paths().back()).data(), gib);
  const double best_rate = read_rate(memory, bytes, threads);
  std::printf("plain reading, GB/s:  1 thread: %.1f  %d: %.1f  %d (the 100 %% below): %.1f\n",
              read_rate(memory, bytes, 1), cores, read_rate(memory, bytes, cores), threads, best_rate);
  const bool all = distances.empty();
  if (all) bench_halves(memory, bytes, threads, best_rate);
  std::printf("  %-38s %7s %7s %8s %8s %8s\n", "layer", "us p50", "p99", "GB/s", "of read", "waiting");
  if (all) distances.push_back(options.prefetch_bytes);
  for (const int64_t distance : distances) {
    options.prefetch_bytes = distance;
    CpuExperts cpu(options);
    if (!all) std::printf(" %d KiB ahead\n", static_cast<int>(distance / 1024));
    for (const auto encoding : {SliceEncoding::int8, SliceEncoding::int4}) {
      bench_encoding(encoding, cpu, memory, bytes, all, best_rate);
    }
  }
  return 0;
}
