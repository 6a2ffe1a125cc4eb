#include "bench/phase_meter.h"

#include <sys/resource.h>

#include <numeric>

namespace lighter::bench {

double process_cpu_s() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) / 1e6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

void PhaseMeter::begin(const ExpertCounters& experts) {
  experts_ = experts;
  if (nvml_ != nullptr) {
    energy_j_ = nvml_->energy_j();
    busy_.clear();
    sampling_ = true;
    thread_ = std::thread([this] { sample(); });
  }
  cpu_s_ = process_cpu_s();
  begin_ = Clock::now();
}

Spent PhaseMeter::end(const ExpertCounters& experts) {
  Spent spent;
  spent.wall_s = std::chrono::duration<double>(Clock::now() - begin_).count();
  spent.cpu_s = process_cpu_s() - cpu_s_;
  spent.experts = experts - experts_;
  if (nvml_ != nullptr) {
    stop_sampling();
    const auto energy = nvml_->energy_j();
    if (energy && energy_j_) spent.gpu_energy_j = *energy - *energy_j_;
    // A phase shorter than NVML's own sampling period would report what came before it.
    if (busy_.size() > 2) {
      spent.gpu_busy_share =
          std::accumulate(busy_.begin(), busy_.end(), 0.0) / static_cast<double>(busy_.size());
    }
  }
  return spent;
}

void PhaseMeter::sample() {
  // Woken seldom: on a machine whose cores are all busy that puts off a worker.
  constexpr auto kPeriod = std::chrono::milliseconds(100);
  std::unique_lock lock(mutex_);
  while (!ended_.wait_for(lock, kPeriod, [&] { return !sampling_; })) {
    if (const auto share = nvml_->busy_share()) busy_.push_back(*share);
  }
}

void PhaseMeter::stop_sampling() {
  {
    std::lock_guard lock(mutex_);
    sampling_ = false;
  }
  ended_.notify_all();
  if (thread_.joinable()) thread_.join();
}

}  // namespace lighter::bench
