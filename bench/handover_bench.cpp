// What of a decode step the CPU's and the link's work does not change: the time from a layer's result to the
// next layer's post. A thread plays the CPU's part and answers each post after exactly so many µs, so that it
// does not matter who else uses the machine's memory. Needs a GPU, and a model of which not all experts are
// resident.
//   handover_bench CONFIG [µs until an answer, 100] [KEY.PATH=VALUE ...]
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "bench/statistics.h"
#include "offload/spin_barrier.h"
#include "runtime/cli/console.h"
#include "runtime/cli/model_config.h"
#include "runtime/cli/session.h"
#include "runtime/error.h"
#include "runtime/step_number.h"

namespace {

using namespace lighter;
using bench::percentile;
using Clock = std::chrono::steady_clock;

constexpr int64_t kWarmUp = 8, kSteps = 64;

double us_between(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<double, std::micro>(end - begin).count();
}

// Its results are zeros. It writes them as many workers do, the last ones at the end.
class PunctualWorker : public MissWorkers {
 public:
  explicit PunctualWorker(double answer_us) : answer_us_(answer_us) {}
  ~PunctualWorker() override { stop(); }

  void start(const MissWork& work, uint32_t first_step) override {
    stopping_ = false;
    thread_ = std::thread([this, mailbox = work.mailbox, first_step] { serve(mailbox, first_step); });
  }
  void stop() override {
    stopping_ = true;
    if (thread_.joinable()) thread_.join();
  }
  bool idle() const override { return true; }
  MissWorkersCounters counters() const override { return {}; }
  std::vector<MissSpan> latest_spans() const override { return {}; }

  // While it is stopped: µs from each answer to the next post, of the same step or of the next one.
  std::vector<double> within_steps, between_steps;

 private:
  void serve(const MissMailbox& mailbox, uint32_t step) {
    Clock::time_point answered = Clock::now();
    for (bool first = true;; ++step) {
      for (int layer = 0; layer < mailbox.shape().layers; ++layer, first = false) {
        for (uint32_t turns = 0; !step_reached(mailbox.posted(layer), step); offload::spin(turns)) {
          if (stopping_) return;
        }
        const auto seen = Clock::now();
        if (!first) (layer == 0 ? between_steps : within_steps).push_back(us_between(answered, seen));
        answer(mailbox, layer, step, seen);
        answered = Clock::now();
      }
    }
  }
  void answer(const MissMailbox& mailbox, int layer, uint32_t step, Clock::time_point seen) const {
    constexpr double first_us = 15, ending_us = 3;  // before the end
    const int64_t values = mailbox.shape().tokens * mailbox.shape().hidden, last = values - values / 20;
    const std::vector<float> zeros(values);
    const auto await = [&](double us) {
      while (us_between(seen, Clock::now()) < us) {
      }
    };
    await(answer_us_ - first_us);
    mailbox.write_result(layer, step, 0, zeros.data(), last);
    await(answer_us_ - ending_us);
    mailbox.publish_ending(layer, step);
    await(answer_us_);
    mailbox.write_result(layer, step, last, zeros.data(), values - last);
    mailbox.publish_done(layer, step);
  }

  const double answer_us_;
  std::thread thread_;
  std::atomic<bool> stopping_ = false;
};

void run(const std::string& file, double answer_us, std::vector<std::string> overrides) {
  for (const char* fixed : {"offload.miss=cpu", "offload.policy=static", "offload.prefetch.enabled=false"}) {
    overrides.emplace_back(fixed);
  }
  const Config config = cli::load_model_config(file, overrides);
  const cli::PreparedModel model = cli::prepare(config);
  if (!model.why_eager.empty()) throw ConfigError("it would be decoded eagerly: " + model.why_eager);
  if (model.plan.all_resident) throw ConfigError("all experts are resident; lower offload.resident");
  auto made = std::make_unique<PunctualWorker>(answer_us);
  const PunctualWorker& worker = *made;
  cli::ProgressLine progress;
  cli::Session session(config, model, std::ref(progress), {}, nullptr, std::move(made));
  progress.finish();
  const int64_t steps = std::min(kWarmUp + kSteps, config.memory.context);
  std::vector<double> step_ms;
  int64_t token = 0;
  for (int64_t position = 0; position < steps; ++position) {
    if (cli::interrupted()) throw Interrupted();
    Step step;
    step.add(0, position, &token, 1);
    step.goes_on = position + 1 < steps;
    const auto begin = Clock::now();
    token = session.decoder().likeliest(step).front();
    step_ms.push_back(1e-3 * us_between(begin, Clock::now()));
  }
  session.decoder().rest();
  const auto rest_of = [](const std::vector<double>& values, size_t left_out) {
    return std::vector<double>(values.begin() + static_cast<ptrdiff_t>(std::min(left_out, values.size() - 1)),
                               values.end());
  };
  const auto layers = static_cast<size_t>(model.spec.moe_layers());
  if (worker.within_steps.empty() || worker.between_steps.empty()) {
    throw ConfigError("two steps of two layers are the least; raise memory.context");
  }
  const auto within = rest_of(worker.within_steps, kWarmUp * (layers - 1));
  std::printf("answers %.0f us after a post, %zu layers, %zu steps\n", answer_us, layers,
              rest_of(step_ms, kWarmUp).size());
  std::printf("from an answer to the next layer's post: %.1f us (%.1f to %.1f, the middle 80 %%)\n",
              percentile(within, 0.5), percentile(within, 0.1), percentile(within, 0.9));
  std::printf("from a step's last answer to the next one's first post: %.0f us\n",
              percentile(rest_of(worker.between_steps, kWarmUp), 0.5));
  std::printf("a step: %.2f ms\n", percentile(rest_of(step_ms, kWarmUp), 0.5));
}

}  // namespace

int main(int count, char** arguments) {
  const double answer_us = count > 2 ? std::atof(arguments[2]) : 100;
  if (count < 2 || answer_us < 20 || answer_us > 10000) {
    std::fprintf(
        stderr, "usage: handover_bench CONFIG [us until an answer, 20 to 10000; 100] [KEY.PATH=VALUE ...]\n");
    return 2;
  }
  cli::catch_ctrl_c();
  cli::log_to_stderr();
  try {
    run(arguments[1], answer_us, std::vector<std::string>(arguments + std::min(count, 3), arguments + count));
    return 0;
  } catch (const Interrupted&) {
    return 130;
  } catch (const ConfigError& error) {
    std::fprintf(stderr, "handover_bench: %s\n", error.what());
    return 2;
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "handover_bench: libtorch: %s\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "handover_bench: %s\n", error.what());
  }
  return 1;
}
