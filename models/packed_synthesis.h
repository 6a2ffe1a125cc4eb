// Random weights drawn in their packed format: what a benchmark needs of a quantized model, without making
// floats that would then have to be quantized. Values have mean 0 and the deviation asked for. The same key
// gives the same bytes on every machine. Thread-safe; uses oneTBB's threads for what is large.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/quant/packed_slice.h"

namespace lighter::models {

// Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014).
constexpr uint64_t splitmix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Bytes [first, first + count) of q: int8 uniform in [-127, 127], or pairs of nibbles uniform in [0, 15].
// first and count: multiples of 8.
void draw_packed_values(SliceEncoding encoding, uint64_t key, int64_t first, int64_t count, std::byte* to);

// Scales of groups [first, first + count), and in int4 their minima, such that the values' deviation over all
// groups is `deviation`. Scales differ from group to group, by up to a quarter. minimums: not used in int8.
void draw_packed_scales(SliceEncoding encoding, uint64_t key, int64_t first, int64_t count, float deviation,
                        uint16_t* scales, uint16_t* minimums);

// A whole slice: gate and up with one deviation, down with another.
void draw_packed_slice(const PackedSliceLayout& layout, uint64_t key, float into, float out_of,
                       std::byte* slice);

}  // namespace lighter::models
