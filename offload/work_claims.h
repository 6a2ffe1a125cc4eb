// How the workers of a phase share its work: it is cut into pieces that get smaller, and whoever is free
// takes the next. A worker that is slow, or comes late, so takes fewer, and nobody waits long at the end.
//
// If a worker loses its core in the midst of a piece, another one computes that piece as well; whoever is
// first to end it hands it over, and nobody else does.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace lighter::offload {

struct WorkPiece {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t number = 0;  // among the phase's
};

// Work [0, total) in as many equal segments as there are workers, and rounds of one piece of each segment. A
// round takes half of what is left, the last one all of it, so that its pieces have about `least` units (at
// least 1) or fewer. What is read at the same time so lies far apart: memory answers 15 threads that are all
// within a few MB a fifth more slowly. A value.
class WorkPieces {
 public:
  static constexpr int kMostRounds = 24;

  WorkPieces() = default;
  WorkPieces(int64_t total, int64_t least, int workers) : total_(total), workers_(workers) {
    while ((total >> halvings_) > least * workers && halvings_ + 1 < kMostRounds) ++halvings_;
  }

  int64_t count() const { return (halvings_ + 1) * workers_; }
  // It can be empty.
  WorkPiece operator[](int64_t piece) const {
    const int64_t round = piece / workers_, segment = piece % workers_;
    const int64_t begin = total_ * segment / workers_, end = total_ * (segment + 1) / workers_;
    const int64_t after = round < halvings_ ? (end - begin) >> (round + 1) : 0;
    return {end - ((end - begin) >> round), end - after, piece};
  }

 private:
  int64_t total_ = 0;
  int64_t workers_ = 1;
  int64_t halvings_ = 0;
};

// Which pieces are taken, and which are handed over. Thread-safe, but for begin().
class WorkClaims {
 public:
  // While nobody else is at it: nothing is taken.
  void begin(int workers) {
    const size_t words = static_cast<size_t>(WorkPieces::kMostRounds) * workers;
    if (words_.size() < words) words_ = std::vector<Word>(words);
    ++time_;
    next_.store(0, std::memory_order_relaxed);
  }

  // False: none is left.
  bool take(const WorkPieces& pieces, WorkPiece& piece) {
    for (;;) {
      const int64_t next = next_.fetch_add(1, std::memory_order_relaxed);
      if (next >= pieces.count()) return false;
      __builtin_prefetch(&words_[next], 1);
      piece = pieces[next];
      if (piece.begin < piece.end) return true;
    }
  }
  // The first so many are taken.
  int64_t taken(const WorkPieces& pieces) const {
    return std::min(next_.load(std::memory_order_relaxed), pieces.count());
  }

  // Of a piece that is taken.
  bool is_handed_over(int64_t piece) const {
    return words_[piece].state.load(std::memory_order_relaxed) == handed_over();
  }
  // By anyone who has computed it. True, once: the result is the caller's to hand over.
  bool may_hand_over(int64_t piece) {
    auto& state = words_[piece].state;
    uint64_t now = state.load(std::memory_order_relaxed);
    while (now != handed_over()) {
      if (state.compare_exchange_weak(now, handed_over(), std::memory_order_relaxed)) return true;
    }
    return false;
  }
  // Whether the caller, beside whoever has taken it, is to compute it: if it is not handed over, and nobody
  // else does so already, or `anyway`.
  bool take_again(int64_t piece, bool anyway) {
    auto& state = words_[piece].state;
    uint64_t now = state.load(std::memory_order_relaxed);
    if (now == handed_over()) return false;
    if (now == taken_again()) return anyway;
    return state.compare_exchange_strong(now, taken_again(), std::memory_order_relaxed);
  }

 private:
  // What is neither is of an earlier time, and the piece open.
  uint64_t taken_again() const { return 2 * time_; }
  uint64_t handed_over() const { return 2 * time_ + 1; }

  struct alignas(64) Word {
    std::atomic<uint64_t> state = 0;
  };
  alignas(64) std::atomic<int64_t> next_ = 0;
  alignas(64) uint64_t time_ = 0;
  std::vector<Word> words_;
};

}  // namespace lighter::offload
