// One forward pass over a batch: some tokens of some sequences. One sequence is a batch of one.
#pragma once

#include <cstdint>
#include <vector>

namespace lighter {

struct Step {
  std::vector<int64_t> tokens;
  std::vector<int64_t> positions;      // of each token, in its sequence
  std::vector<int> sequences;          // slots of the sequences in the KV cache
  std::vector<int64_t> offsets = {0};  // sequence i has tokens [offsets[i], offsets[i + 1])
  bool all_logits = false;             // of every token; else of each sequence's last one
  bool goes_on = false;  // for likeliest(): the token that it finds will probably be the next step's

  // Appends count tokens of one sequence, the first at `position`.
  void add(int sequence, int64_t position, const int64_t* first, int64_t count) {
    sequences.push_back(sequence);
    for (int64_t i = 0; i < count; ++i) {
      tokens.push_back(first[i]);
      positions.push_back(position + i);
    }
    offsets.push_back(static_cast<int64_t>(tokens.size()));
  }
};

}  // namespace lighter
