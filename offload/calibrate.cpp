#include "offload/calibrate.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "offload/cpu_rates.h"
#include "offload/gpu_rates.h"
#include "runtime/device/near_pages.h"
#include "runtime/utc_time.h"

namespace lighter::offload {
namespace {

using Clock = std::chrono::steady_clock;

constexpr uint64_t kCopyBytes = uint64_t{128} << 20;
constexpr uint64_t kReadBytes = uint64_t{1} << 30;  // of device memory
constexpr int kRounds = 5;
constexpr double kSecondsEach = 0.25;
constexpr int64_t kHidden = 5120, kWidth = 512;  // slices like Scout's
constexpr SliceEncoding kPacked[] = {SliceEncoding::int8, SliceEncoding::int4};

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

double best(const std::function<double()>& measure) {
  double most = 0;
  for (int i = 0; i < kRounds; ++i) most = std::max(most, measure());
  return most;
}

// Calls measure(encoding) in rounds. Others may use the machine's memory now and then, so what the CPU reads
// in a quarter of a second says little: `to` gets, of each encoding, the round with the median of `rank`.
template <typename Figure, typename Measure, typename Rank = std::identity>
void take_medians(ByFormat<std::optional<Figure>>& to, const Measure& measure, const Rank& rank = {}) {
  ByFormat<std::vector<Figure>> rounds;
  for (int i = 0; i < kRounds; ++i) {
    for (const auto encoding : kPacked) rounds[encoding].push_back(measure(encoding));
  }
  for (const auto encoding : kPacked) {
    auto& results = rounds[encoding];
    std::ranges::nth_element(results, results.begin() + kRounds / 2, {}, rank);
    to[encoding] = results[kRounds / 2];
  }
}

class Machinery {
 public:
  // The device reads the first part of host_bytes, and the CPU the rest, as with missed slices.
  Machinery(Device& device, int threads, uint64_t host_bytes, const Progress& progress)
      : device_(device),
        threads_(threads),
        host_(std::move(
            device.allocate_host_parts({{host_bytes}}, "measuring rates", device.is_cuda(), progress)
                .front())),
        arena_(device.allocate(kCopyBytes, "measuring rates")),
        stream_(device.new_copy_stream()),
        begin_(device.new_event()),
        end_(device.new_event()) {
    fill_with_weights(host_.data(), host_.bytes(), threads);
  }

  double host_read() {
    return best([&] { return host_read_rate(cpu_part(), cpu_bytes(), threads_); });
  }

  double link() {
    return best([&] { return timed([&] { return copy_all(); }); });
  }

  // Plain reading by the CPU while copies run, together.
  double both() {
    std::vector<double> passes;
    const double copied = beside([&] { return copy_all(); }, link(), 2 * kSecondsEach,
                                 [&](const auto& go_on) {
                                   while (go_on())
                                     passes.push_back(host_read_rate(cpu_part(), cpu_bytes(), threads_));
                                   return 0.0;
                                 })
                              .device;
    return copied + *std::ranges::max_element(passes);
  }

  double device_read() {
    GpuReading& gpu = this->gpu();
    return best([&] { return timed([&] { return gpu.read(*stream_, weights_.data(), weights_.bytes()); }); });
  }

  double kernel(SliceEncoding encoding) {
    GpuReading& gpu = this->gpu();
    return best([&] {
      return timed([&] { return gpu.decode(*stream_, encoding, weights_.data(), weights_.bytes()); });
    });
  }

  double zero_copy(SliceEncoding encoding) {
    return best([&] { return timed([&] { return zero_copy_all(encoding); }); });
  }

  double cpu_experts(CpuExperts& cpu, SliceEncoding encoding, int tokens) {
    const SliceField& slices = field(encoding);
    const auto begin = Clock::now();
    return cpu_experts_rate(cpu, slices, tokens, [&] { return seconds_since(begin) < kSecondsEach; });
  }

  SharedRate beside_copies(CpuExperts& cpu, SliceEncoding encoding, double link_rate) {
    return experts_beside(
        cpu, encoding, [&] { return copy_all(); }, link_rate);
  }

  SharedRate beside_zero_copy(CpuExperts& cpu, SliceEncoding encoding, double zero_copy_rate) {
    return experts_beside(
        cpu, encoding, [&] { return zero_copy_all(encoding); }, zero_copy_rate);
  }

 private:
  using Enqueue = std::function<uint64_t()>;  // returns the bytes that will be read

  uint64_t device_bytes() const {
    return static_cast<uint64_t>(static_cast<double>(host_.bytes()) * kFarShare) / kCopyBytes * kCopyBytes;
  }
  std::byte* cpu_part() const { return host_.data() + device_bytes(); }
  uint64_t cpu_bytes() const { return host_.bytes() - device_bytes(); }

  // Of the CPU's part. All encodings lie in the same bytes: the scales that one writes are scales or any
  // values of the other.
  const SliceField& field(SliceEncoding encoding) {
    auto& field = fields_[encoding];
    if (!field) field.emplace(cpu_part(), cpu_bytes(), encoding, kHidden, kWidth);
    return *field;
  }

  GpuReading& gpu() {
    if (gpu_ == nullptr) {
      gpu_ = std::make_unique<GpuReading>(device_);
      weights_ = device_.allocate(kReadBytes, "measuring rates");
      for (uint64_t at = 0; at < kReadBytes; at += host_.bytes()) {
        stream_->copy(weights_.data() + at, host_.data(), std::min<uint64_t>(kReadBytes - at, host_.bytes()));
      }
      stream_->synchronize();
    }
    return *gpu_;
  }

  uint64_t copy_all() {
    for (uint64_t at = 0; at < device_bytes(); at += kCopyBytes) {
      stream_->copy(arena_.data(), host_.data() + at, kCopyBytes);
    }
    return device_bytes();
  }

  uint64_t zero_copy_all(SliceEncoding encoding) {
    return gpu().decode(*stream_, encoding, host_.data(), device_bytes());
  }

  double timed(const Enqueue& enqueue) {
    stream_->record(*begin_);
    const uint64_t bytes = enqueue();
    stream_->record(*end_);
    stream_->synchronize();
    return static_cast<double>(bytes) / device_.milliseconds_between(*begin_, *end_) * 1e-6;
  }

  // The stream does enough for so many seconds; meanwhile `work` runs for as long as go_on() says, and
  // returns a rate. expected: GB/s of the stream alone.
  template <typename Work>
  SharedRate beside(const Enqueue& enqueue, double expected, double seconds, const Work& work) {
    SharedRate rates;
    uint64_t bytes = 0;
    stream_->record(*begin_);
    while (static_cast<double>(bytes) < expected * 1e9 * seconds) bytes += enqueue();
    stream_->record(*end_);
    rates.cpu = work([&] { return !end_->passed(); });
    stream_->synchronize();
    rates.device = static_cast<double>(bytes) / device_.milliseconds_between(*begin_, *end_) * 1e-6;
    return rates;
  }

  SharedRate experts_beside(CpuExperts& cpu, SliceEncoding encoding, const Enqueue& enqueue,
                            double expected) {
    const SliceField& slices = field(encoding);
    return beside(enqueue, expected, kSecondsEach,
                  [&](const auto& go_on) { return cpu_experts_rate(cpu, slices, 1, go_on); });
  }

  Device& device_;
  const int threads_;
  const Buffer host_;
  const Buffer arena_;
  Buffer weights_;  // in device memory
  ByFormat<std::optional<SliceField>> fields_;
  std::unique_ptr<GpuReading> gpu_;
  const std::unique_ptr<Stream> stream_;
  const std::unique_ptr<Event> begin_, end_;
};

}  // namespace

Rates measure_ceilings(Device& device, int threads, const Rates& given) {
  Rates rates = given;
  Machinery machine(device, threads, ceilings_host_bytes(device.is_cuda()), kNoProgress);
  if (!rates.cpu_read) rates.cpu_read = machine.host_read();
  if (!rates.link) rates.link = machine.link();
  if (!rates.both && device.is_cuda()) rates.both = machine.both();
  if (!rates.device_read) rates.device_read = device.is_cuda() ? machine.device_read() : *rates.cpu_read;
  return rates;
}

Calibration calibrate(Device& device, int threads, uint64_t host_bytes, const Progress& progress) {
  const auto begins = [&](const std::string& what) { progress(what, 0, 0); };
  Calibration c = default_calibration(device.is_cuda());
  c.device = device.name();
  c.cpu = cpu_name();
  c.threads = threads;
  c.date = utc_time("%Y-%m-%d");
  Machinery machine(device, threads, host_bytes, progress);
  begins("host memory");
  c.host_read = machine.host_read();
  begins("copies to the device");
  c.link = machine.link();
  begins("the CPU's experts");
  CpuExpertsOptions options;
  options.threads = threads;
  CpuExperts cpu(options);
  take_medians(c.cpu_experts, [&](auto encoding) { return machine.cpu_experts(cpu, encoding, 1); });
  take_medians(c.cpu_experts_of_4, [&](auto encoding) { return machine.cpu_experts(cpu, encoding, 4); });
  if (!device.is_cuda()) {
    c.device_read = c.host_read;
    for (const auto encoding : kPacked) c.kernels[encoding] = *c.cpu_experts[encoding];
    return c;
  }
  c.both_read = machine.both();
  begins("device memory and kernels");
  c.device_read = machine.device_read();
  for (const auto encoding : {SliceEncoding::dense, SliceEncoding::int8, SliceEncoding::int4}) {
    c.kernels[encoding] = machine.kernel(encoding);
  }
  begins("kernels that read host memory");
  c.zero_copy = machine.zero_copy(SliceEncoding::int8);
  begins("both ways at once");
  const auto sum = [](const SharedRate& rate) { return rate.cpu + rate.device; };
  take_medians(
      c.beside_copies, [&](auto encoding) { return machine.beside_copies(cpu, encoding, c.link); }, sum);
  take_medians(
      c.beside_zero_copy,
      [&](auto encoding) { return machine.beside_zero_copy(cpu, encoding, *c.zero_copy); }, sum);
  return c;
}

}  // namespace lighter::offload
