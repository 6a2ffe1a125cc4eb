// How the workers of a phase share its work: it is cut into pieces that get smaller, and whoever is free
// takes the next. A worker that is slow, or comes late, so takes fewer, and nobody waits long at the end.
#pragma once

#include <atomic>
#include <cstdint>

namespace lighter::offload {

struct WorkPiece {
  int64_t begin = 0;
  int64_t end = 0;
};

// Work [0, total) in as many equal segments as there are workers, and rounds of one piece of each segment. A
// round takes half of what is left, the last one all of it, so that its pieces have about `least` units (at
// least 1) or fewer. What is read at the same time so lies far apart: memory answers 15 threads that are all
// within a few MB a fifth more slowly. A value.
class WorkPieces {
 public:
  WorkPieces() = default;
  WorkPieces(int64_t total, int64_t least, int workers) : total_(total), workers_(workers) {
    while ((total >> halvings_) > least * workers) ++halvings_;
  }

  int64_t count() const { return (halvings_ + 1) * workers_; }
  // It can be empty.
  WorkPiece operator[](int64_t piece) const {
    const int64_t round = piece / workers_, segment = piece % workers_;
    const int64_t begin = total_ * segment / workers_, end = total_ * (segment + 1) / workers_;
    const int64_t after = round < halvings_ ? (end - begin) >> (round + 1) : 0;
    return {end - ((end - begin) >> round), end - after};
  }

 private:
  int64_t total_ = 0;
  int64_t workers_ = 1;
  int64_t halvings_ = 0;
};

// Which pieces are taken. take() is thread-safe; reset() only while nobody takes.
class WorkClaims {
 public:
  // False: none is left.
  bool take(const WorkPieces& pieces, WorkPiece& piece) {
    for (;;) {
      const int64_t next = next_.fetch_add(1, std::memory_order_relaxed);
      if (next >= pieces.count()) return false;
      piece = pieces[next];
      if (piece.begin < piece.end) return true;
    }
  }
  void reset() { next_.store(0, std::memory_order_relaxed); }

 private:
  alignas(64) std::atomic<int64_t> next_ = 0;
};

}  // namespace lighter::offload
