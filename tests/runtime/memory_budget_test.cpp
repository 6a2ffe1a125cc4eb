#include "runtime/memory/memory_budget.h"

#include <doctest/doctest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "runtime/error.h"

namespace lighter {

TEST_CASE("a budget can be used up to its last byte, and not one further") {
  MemoryBudget budget("memory.gpu_budget", 100);
  budget.take(60, "weights");
  budget.take(40, "cache");
  CHECK(budget.used_bytes() == 100);
  CHECK_THROWS_AS(budget.take(1, "more"), CapacityError);
  CHECK(budget.used_bytes() == 100);
  CHECK(budget.peak_bytes() == 100);
}

TEST_CASE("a refusal names the budget, the purpose and the numbers, and takes nothing") {
  MemoryBudget budget("memory.gpu_budget", 1000);
  budget.take(900, "weights");
  CHECK_THROWS_WITH(
      budget.take(200, "the KV cache"),
      doctest::Contains("memory.gpu_budget: the KV cache needs 200 B, but only 100 B of 1000 B are left"));
  CHECK(budget.used_bytes() == 900);
  CHECK(budget.peak_bytes() == 900);
}

TEST_CASE("a size near 2^64 does not wrap around") {
  MemoryBudget budget("memory.gpu_budget", 1000);
  budget.take(1, "weights");
  CHECK_THROWS_AS(budget.take(~uint64_t{0}, "too much"), CapacityError);
  CHECK(budget.used_bytes() == 1);
}

TEST_CASE("the peak remembers what was given back") {
  MemoryBudget budget("memory.host_budget", 100);
  budget.take(80, "staging");
  budget.give_back(80);
  budget.take(10, "store");
  CHECK(budget.used_bytes() == 10);
  CHECK(budget.peak_bytes() == 80);
  CHECK(budget.limit_bytes() == 100);
}

TEST_CASE("what is spare is within the limit and not in the peak, and comes in whole units") {
  MemoryBudget budget("memory.host_budget", 1000);
  budget.take(300, "a part");
  CHECK(budget.take_spare(500, 200) == 400);
  CHECK(budget.take_spare(1000, 200) == 200);
  CHECK(budget.take_spare(1000, 200) == 0);
  CHECK_THROWS_AS(budget.take(101, "too much"), CapacityError);
  CHECK(budget.used_bytes() == 300);
  CHECK(budget.peak_bytes() == 300);
  budget.give_back_spare(600);
  budget.take(700, "the rest");
}

TEST_CASE("threads that take together never pass the limit") {
  MemoryBudget budget("memory.host_budget", 500);
  std::atomic<int> refused = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 2000; ++i) {
        try {
          budget.take(150, "a part");
          budget.give_back(150);
        } catch (const CapacityError&) {
          ++refused;
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(budget.used_bytes() == 0);
  CHECK(budget.peak_bytes() <= 500);
  CHECK(refused < 8000);
}

}  // namespace lighter
