#include "offload/miss_fetcher.h"

#include <string>
#include <utility>

#include "offload/spin_barrier.h"
#include "runtime/error.h"
#include "runtime/kernels/decode.h"

namespace lighter::offload {

MissFetcher::MissFetcher(Device& device, const ExpertGrid& grid, int experts_per_token)
    : grid_(grid), slices_(device.new_copy_stream()), words_(device.new_copy_stream()) {
  for (int i = 0; i < experts_per_token * grid.slices; ++i) copied_.push_back(device.new_event());
}

MissFetcher::~MissFetcher() {
  try {
    stop();
  } catch (const DeviceError&) {  // a step reports it
  }
}

void MissFetcher::start(const MissWork& work, uint32_t first_step) {
  if (thread_.joinable()) throw DeviceError("missed experts are being fetched already; stop() first");
  stopping_ = false;
  failure_ = nullptr;
  thread_ = std::thread([this, work, first_step] {
    try {
      serve(work, first_step);
    } catch (...) {
      failure_ = std::current_exception();
    }
  });
}

void MissFetcher::stop() {
  if (!thread_.joinable()) return;
  stopping_ = true;
  thread_.join();
  // After a step that was given up copies may still be under way.
  slices_->synchronize();
  words_->synchronize();
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void MissFetcher::serve(const MissWork& work, uint32_t step) {
  for (;; ++step) {
    for (int layer = 0; layer < grid_.layers; ++layer) {
      for (uint32_t turns = 0; !step_reached(work.mailbox.posted(layer), step); spin(turns)) {
        if (stopping_.load(std::memory_order_relaxed)) return;
      }
      const MissPost post = work.mailbox.read(layer);
      if (layer == 0) step = post.step;  // the first one may skip some
      try {
        copy_missed(work, layer, post);
      } catch (const std::exception& error) {
        throw DeviceError("at " + place_of(step, layer) + ": " + error.what());
      }
    }
  }
}

void MissFetcher::copy_missed(const MissWork& work, int layer, const MissPost& post) {
  const MissWork::Arrivals& to = work.arrivals;
  to.tags[layer] = kernels::arrival_tag(post.step, layer, grid_.layers);
  size_t slot = 0;
  for_posted(post, work.mailbox.shape().experts_per_token, grid_.experts, [&](int expert) {
    for (int slice = 0; slice < grid_.slices; ++slice) {
      const size_t index = grid_.index({layer, expert, slice});
      if (work.places->device[index] != nullptr) continue;
      Event& copied = *copied_.at(slot);
      slices_->copy(to.slots + slot * grid_.slice_bytes, work.places->host[index], grid_.slice_bytes);
      slices_->record(copied);
      words_->wait(copied);
      words_->copy(to.arrived + slot, to.tags + layer, sizeof(uint32_t));
      ++slot;
    }
  });
  work.mailbox.publish_done(layer, post.step);  // it needs the post and the places no longer
}

}  // namespace lighter::offload
