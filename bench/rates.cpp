#include "bench/rates.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

#include "runtime/torch/tensors.h"
#include "runtime/torch/torch_scope.h"

namespace lighter::bench {
namespace {

using Clock = std::chrono::steady_clock;
constexpr size_t kHostBytes = size_t{512} << 20;
constexpr size_t kCopyBytes = size_t{128} << 20;
constexpr size_t kReadBytes = size_t{2} << 30;
constexpr int kRounds = 5;

double gb_per_s(double bytes, Clock::time_point begin) {
  return bytes / std::chrono::duration<double>(Clock::now() - begin).count() / 1e9;
}

uint64_t sum_of(const std::byte* data, size_t bytes) {
  // Eight sums, so that the additions do not wait for one another.
  uint64_t sums[8] = {};
  const auto* words = reinterpret_cast<const uint64_t*>(data);
  for (size_t i = 0; i + 8 <= bytes / sizeof(uint64_t); i += 8) {
    for (size_t lane = 0; lane < 8; ++lane) sums[lane] += words[i + lane];
  }
  return std::accumulate(std::begin(sums), std::end(sums), uint64_t{0});
}

// One pass of all threads over the memory, each over its own part.
double read_once(const Buffer& memory, int threads) {
  std::atomic<uint64_t> sink{0};
  const size_t part = memory.bytes() / static_cast<size_t>(threads) / 4096 * 4096;
  const auto begin = Clock::now();
  std::vector<std::thread> readers;
  for (int i = 0; i < threads; ++i) {
    readers.emplace_back([&, i] { sink += sum_of(memory.data() + static_cast<size_t>(i) * part, part); });
  }
  for (std::thread& reader : readers) reader.join();
  return gb_per_s(static_cast<double>(part) * threads, begin);
}

double copy_once(Stream& stream, const Buffer& to, const Buffer& from) {
  const auto begin = Clock::now();
  for (size_t at = 0; at + kCopyBytes <= from.bytes(); at += kCopyBytes) {
    stream.copy(to.data(), from.data() + at, kCopyBytes);
  }
  stream.synchronize();
  return gb_per_s(static_cast<double>(from.bytes()), begin);
}

// The sum of what both reach while both run.
double both_once(Stream& stream, const Buffer& to, const Buffer& copied, const Buffer& read, int threads) {
  std::atomic<bool> copying{true};
  double link = 0;
  std::thread copier([&] {
    link = copy_once(stream, to, copied);
    copying = false;
  });
  std::vector<double> passes;
  while (copying) passes.push_back(read_once(read, threads));
  copier.join();
  return link + *std::ranges::max_element(passes);
}

template <typename Measure>
double best(Measure measure) {
  double most = 0;
  for (int i = 0; i < kRounds; ++i) most = std::max(most, measure());
  return most;
}

// libtorch's sum reads device memory at its full rate.
double device_read(Device& device) {
  const TorchScope scope(device, kReadBytes + (size_t{128} << 20), 1);
  const at::Tensor wide = at::ones({static_cast<int64_t>(kReadBytes / sizeof(float))},
                                   at::device(torch_device(device)).dtype(at::kFloat));
  const auto begin = device.new_event(), end = device.new_event();
  return best([&] {
    Stream& stream = device.compute_stream();
    stream.record(*begin);
    const at::Tensor sum = at::sum(wide);
    stream.record(*end);
    stream.synchronize();
    return static_cast<double>(kReadBytes) / device.milliseconds_between(*begin, *end) / 1e6;
  });
}

}  // namespace

Rates measure_rates(Device& device, int threads, const Rates& given) {
  Rates rates = given;
  const Buffer copied = device.allocate_host(kHostBytes, "measuring rates");
  const Buffer read = device.allocate_host(kHostBytes, "measuring rates");
  std::memset(copied.data(), 1, copied.bytes());
  std::memset(read.data(), 1, read.bytes());
  if (!rates.cpu_read) rates.cpu_read = best([&] { return read_once(read, threads); });
  if (!rates.link || (!rates.both && device.is_cuda())) {
    const Buffer to = device.allocate(kCopyBytes, "measuring rates");
    const auto stream = device.new_copy_stream();
    if (!rates.link) rates.link = best([&] { return copy_once(*stream, to, copied); });
    if (!rates.both && device.is_cuda()) {
      rates.both = best([&] { return both_once(*stream, to, copied, read, threads); });
    }
  }
  if (!rates.device_read) rates.device_read = device.is_cuda() ? device_read(device) : *rates.cpu_read;
  return rates;
}

}  // namespace lighter::bench
