#include "runtime/kv/block_table.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "runtime/error.h"

namespace lighter {

TEST_CASE("without a window every position has a row of its own") {
  BlockTable table(16, 0, 100, 1);
  CHECK(table.blocks_per_sequence() == 7);
  table.extend(0, 99);
  std::set<int64_t> rows;
  for (int64_t position = 0; position < 100; ++position) {
    rows.insert(table.row(0, position));
    CHECK(table.first_visible(position) == 0);
  }
  CHECK(rows.size() == 100);
  CHECK(*rows.begin() >= 0);
  CHECK(*rows.rbegin() < table.total_blocks() * 16);
}

TEST_CASE("within a window only the current chunk is kept, and a new chunk writes over the last one") {
  BlockTable table(16, 64, 1000, 1);
  CHECK(table.blocks_per_sequence() == 4);
  for (int64_t position = 0; position < 1000; ++position) {
    table.extend(0, position);
    CHECK(table.row(0, position) == table.row(0, position % 64));
    CHECK(table.first_visible(position) == position - position % 64);
    std::set<int64_t> visible;
    for (int64_t seen = table.first_visible(position); seen <= position; ++seen)
      visible.insert(table.row(0, seen));
    CHECK(static_cast<int64_t>(visible.size()) == position % 64 + 1);
  }
}

TEST_CASE("a window longer than the context keeps the context") {
  BlockTable table(16, 8192, 40, 2);
  CHECK(table.blocks_per_sequence() == 3);
  CHECK(table.total_blocks() == 6);
  table.extend(0, 39);
  CHECK(table.row(0, 39) % 16 == 7);
  CHECK(table.first_visible(39) == 0);
}

TEST_CASE("a prompt may reach across chunk borders at once") {
  BlockTable table(16, 64, 1000, 1);
  table.extend(0, 200);  // four chunks
  std::set<int64_t> rows;
  for (int64_t position = 192; position <= 255; ++position) rows.insert(table.row(0, position));
  CHECK(rows.size() == 64);
}

TEST_CASE("blocks are taken only when a position needs them, and are used again after release") {
  BlockTable table(8, 0, 64, 2);
  table.extend(0, 7);
  const int64_t first = table.row(0, 0);
  table.extend(1, 0);
  CHECK(table.row(1, 0) / 8 != first / 8);
  table.release(0);
  table.extend(0, 0);
  CHECK(table.row(0, 0) == first);
  table.extend(0, 63);
  table.extend(1, 63);  // there are blocks for every sequence's whole context
}

TEST_CASE("a position beyond the context is a CapacityError that says how to go on") {
  BlockTable table(8, 0, 64, 1);
  CHECK_THROWS_WITH_AS(table.extend(0, 64),
                       doctest::Contains("position 64 is beyond memory.context of 64 tokens"), CapacityError);
  CHECK_NOTHROW(table.extend(0, 63));
}

TEST_CASE("no two sequences ever share a row, however they grow and end") {
  std::mt19937 random(9);
  for (const int64_t window : {0, 32}) {
    constexpr int kSequences = 5;
    BlockTable table(8, window, 100, kSequences);
    std::vector<int64_t> length(kSequences);
    for (int step = 0; step < 1000; ++step) {
      const int sequence = static_cast<int>(random() % kSequences);
      if (random() % 10 == 0) {
        table.release(sequence);
        length[sequence] = 0;
        continue;
      }
      length[sequence] = std::min<int64_t>(100, length[sequence] + 1 + random() % 12);
      table.extend(sequence, length[sequence] - 1);
      std::map<int64_t, int> owner;
      for (int s = 0; s < kSequences; ++s) {
        if (length[s] == 0) continue;
        for (int64_t at = table.first_visible(length[s] - 1); at < length[s]; ++at) {
          const int64_t row = table.row(s, at);
          REQUIRE(row < table.total_blocks() * 8);
          REQUIRE(owner.emplace(row, s).second);
        }
      }
    }
  }
}

}  // namespace lighter
