#include "runtime/device/device.h"

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "runtime/device/host_memory.h"
#include "runtime/error.h"

namespace lighter {
namespace {

constexpr size_t kBig = size_t{8} << 20;  // takes a copy stream about a millisecond

std::vector<std::byte> bytes_of(size_t size, int value) {
  return std::vector<std::byte>(size, std::byte(value));
}

}  // namespace

TEST_CASE("memory is entered in its budget while it is held, and aligned to 4096 bytes") {
  const auto device = make_cpu_device(10'000, 20'000);
  {
    const Buffer on_device = device->allocate(6'000, "weights");
    const Buffer on_host = device->allocate_host(7'000, "store");
    CHECK(reinterpret_cast<uintptr_t>(on_device.data()) % 4096 == 0);
    CHECK(reinterpret_cast<uintptr_t>(on_host.data()) % 4096 == 0);
    CHECK(on_device.bytes() == 6'000);
    CHECK(device->device_budget().used_bytes() == 6'000);
    CHECK(device->host_budget().used_bytes() == 7'000);
    CHECK(device->driver_used_bytes() == 6'000);
    CHECK_THROWS_AS(device->allocate(4'001, "too much"), CapacityError);
    CHECK_THROWS_AS(device->allocate_host(13'001, "too much"), CapacityError);
    std::memset(on_device.data(), 1, on_device.bytes());
    std::memset(on_host.data(), 1, on_host.bytes());
  }
  CHECK(device->device_budget().used_bytes() == 0);
  CHECK(device->host_budget().used_bytes() == 0);
  CHECK(device->device_budget().peak_bytes() == 6'000);
}

TEST_CASE("memory that the system does not have is a CapacityError, and is not left in the budget") {
  const auto device = make_cpu_device(~uint64_t{0}, ~uint64_t{0});
  CHECK_THROWS_AS(device->allocate(uint64_t{1} << 60, "the impossible"), CapacityError);
  CHECK(device->device_budget().used_bytes() == 0);
}

TEST_CASE("a buffer moves with its memory, which is given back once") {
  const auto device = make_cpu_device(10'000, 0);
  Buffer first = device->allocate(1'000, "first");
  std::byte* const data = first.data();
  Buffer second = std::move(first);
  CHECK(second.data() == data);
  CHECK(bool(second));
  second = device->allocate(2'000, "other");
  first = Buffer();
  CHECK(device->device_budget().used_bytes() == 2'000);
  second = Buffer();
  CHECK(device->device_budget().used_bytes() == 0);
  const Buffer none = device->allocate(0, "nothing");
  CHECK_FALSE(bool(none));
  CHECK(none.bytes() == 0);
}

TEST_CASE("host memory comes zero-filled, and touching it keeps it so") {
  const size_t bytes = (size_t{5} << 20) + 4097;
  auto* const data = static_cast<std::byte*>(map_host_memory(bytes));
  touch_host_memory(data, bytes);
  size_t wrong = 0;
  for (size_t i = 0; i < bytes; ++i) wrong += data[i] != std::byte{0};
  CHECK(wrong == 0);
  unmap_host_memory(data, bytes);
}

TEST_CASE("a stream carries out its copies in order") {
  const auto device = make_cpu_device(0, 0);
  const auto stream = device->new_copy_stream();
  const auto ones = bytes_of(kBig, 1);
  auto middle = bytes_of(kBig, 0);
  auto last = bytes_of(kBig, 0);
  stream->copy(middle.data(), ones.data(), kBig);
  stream->copy(last.data(), middle.data(), kBig);
  stream->synchronize();
  CHECK(last == ones);
}

TEST_CASE("values that are put on the device are read before put() returns") {
  const auto device = make_cpu_device(1 << 20, 0);
  const Buffer memory = device->allocate(3 * sizeof(int64_t), "values");
  auto* const to = reinterpret_cast<int64_t*>(memory.data());
  std::vector<int64_t> values = {5, -6, 7};
  device->put(to, values);
  values.assign(3, 0);
  device->compute_stream().synchronize();
  CHECK(std::vector<int64_t>(to, to + 3) == std::vector<int64_t>{5, -6, 7});
}

TEST_CASE(
    "the compute stream holds until the host has set a word to the value or a later one, also past 2^32") {
  const auto device = make_cpu_device(0, 1 << 12);
  std::atomic<uint32_t> word = 0xFFFFFFFE;
  for (const uint32_t value : {0xFFFFFFFFu, 1u}) {
    std::atomic<bool> set = false;
    std::thread host([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(30));
      set = true;
      word = value;
      word.notify_all();
    });
    device->hold_until(word, value);
    CHECK(set);
    host.join();
    device->hold_until(word, value - 1);  // was there before
  }
}

TEST_CASE("an event that was never recorded has passed") {
  const auto device = make_cpu_device(0, 0);
  const auto event = device->new_event();
  CHECK(event->passed());
  event->wait_on_host();
  const auto stream = device->new_copy_stream();
  stream->wait(*event);
  stream->synchronize();
  CHECK(device->milliseconds_between(*event, *event) == 0);
}

TEST_CASE("a recorded event passes after everything before it in its stream") {
  const auto device = make_cpu_device(0, 0);
  const auto stream = device->new_copy_stream();
  const auto event = device->new_event();
  const auto ones = bytes_of(kBig, 1);
  auto to = bytes_of(kBig, 0);
  stream->copy(to.data(), ones.data(), kBig);
  stream->record(*event);
  event->wait_on_host();
  CHECK(event->passed());
  CHECK(to == ones);
}

TEST_CASE("a stream that waits for an event sees what came before it in another stream") {
  const auto device = make_cpu_device(0, 0);
  const auto first = device->new_copy_stream();
  const auto second = device->new_copy_stream();
  const auto event = device->new_event();
  const auto ones = bytes_of(kBig, 1);
  auto middle = bytes_of(kBig, 0);
  auto last = bytes_of(kBig, 0);
  const auto back = device->new_event();
  for (int round = 0; round < 3; ++round) {
    first->wait(*back);
    first->copy(middle.data(), ones.data(), kBig);
    first->record(*event);
    second->wait(*event);
    second->copy(last.data(), middle.data(), kBig);
    second->record(*back);
  }
  second->synchronize();
  first->synchronize();
  CHECK(last == ones);
  // The compute stream is the caller's own thread.
  first->copy(middle.data(), last.data(), kBig);
  first->record(*event);
  device->compute_stream().wait(*event);
  CHECK(event->passed());
  device->compute_stream().record(*event);
  CHECK(event->passed());
}

TEST_CASE("a wait refers to the latest record before it; recording again does not move the wait") {
  const auto device = make_cpu_device(0, 0);
  const auto first = device->new_copy_stream();
  const auto second = device->new_copy_stream();
  const auto moved = device->new_event();
  const auto back = device->new_event();
  first->record(*moved);
  second->wait(*moved);
  second->record(*back);
  first->wait(*back);
  first->record(*moved);  // Had the wait moved along, the two streams would now wait for each other.
  first->synchronize();
  second->synchronize();
  CHECK(moved->passed());
}

TEST_CASE("a stream that ends has done what it was asked for") {
  const auto device = make_cpu_device(0, 0);
  const auto ones = bytes_of(kBig, 1);
  auto to = bytes_of(kBig, 0);
  const auto event = device->new_event();
  {
    const auto stream = device->new_copy_stream();
    stream->copy(to.data(), ones.data(), kBig);
    stream->record(*event);
  }
  CHECK(event->passed());
  CHECK(to == ones);
}

TEST_CASE("an event may outlive its stream, and go before its record has passed") {
  const auto device = make_cpu_device(0, 0);
  const auto ones = bytes_of(kBig, 1);
  auto to = bytes_of(kBig, 0);
  const auto stream = device->new_copy_stream();
  const auto other = device->new_copy_stream();
  for (int i = 0; i < 10; ++i) {
    const auto event = device->new_event();
    stream->copy(to.data(), ones.data(), kBig);
    stream->record(*event);
    other->wait(*event);
  }
  other->synchronize();
  CHECK(to == ones);
}

TEST_CASE("one thread may record an event again while others wait for it") {
  const auto device = make_cpu_device(0, 0);
  const auto event = device->new_event();
  std::thread recorder([&] {
    for (int i = 0; i < 2'000; ++i) device->compute_stream().record(*event);
  });
  std::thread waiter([&] {
    const auto stream = device->new_copy_stream();
    for (int i = 0; i < 2'000; ++i) stream->wait(*event);
    stream->synchronize();
  });
  for (int i = 0; i < 2'000; ++i) event->wait_on_host();
  recorder.join();
  waiter.join();
  CHECK(event->passed());
}

TEST_CASE("the time between two events is that of the work between them") {
  const auto device = make_cpu_device(0, 0);
  const auto stream = device->new_copy_stream();
  const auto begin = device->new_event();
  const auto end = device->new_event();
  const auto ones = bytes_of(kBig, 1);
  auto to = bytes_of(kBig, 0);
  stream->record(*begin);
  for (int i = 0; i < 3; ++i) stream->copy(to.data(), ones.data(), kBig);
  stream->record(*end);
  stream->synchronize();
  CHECK(device->milliseconds_between(*begin, *end) > 0);
  CHECK(device->milliseconds_between(*begin, *begin) == 0);
}

}  // namespace lighter
