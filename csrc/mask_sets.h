// What the mask makers share: sets of tokens as bits, and the choice of tokens by their random keys.
//
// A maker is one integer algorithm for the team of lanes that works on one sample: a single lane on the host
// (cpu/mask_makers.h), a warp on a GPU (cuda/mask_makers.cuh). Lanes share out the loops; all take the same branches. A
// team has
//
//   lane(), lanes()          which one this is, and how many there are
//   sum(x)                   of all lanes, known to all
//   sync()                   what one has written the others may read
//   add(words, bits)         bits into a word that others add to as well
//   next(counter)            its value before it is raised by one
//   smallest(order, n, k)    the k smallest of n distinct numbers come first, in any order
//   sort(order, n)           all come in order; behind them there is room up to the next power of two
#pragma once
#include <cmath>
#include <cstdint>

#include "philox.h"

#if defined(__CUDACC__)
#define SSLK_TEAM __device__ __forceinline__
#else
#define SSLK_TEAM inline
#endif

namespace sslkernels {
namespace masks {

constexpr int64_t kMaxTokens = 65536;     // of a sample
constexpr uint32_t kKeyDraws = 1u << 31;  // draws from here on are keys of tokens, four each

// A sample's random numbers. Draws below kKeyDraws belong to the steps of an algorithm.
struct Draws {
  uint64_t seed, sample;
  uint32_t stream;

  SSLK_TEAM void words(uint32_t draw, uint32_t (&w)[4]) const {
    w[0] = draw, w[1] = static_cast<uint32_t>(sample), w[2] = static_cast<uint32_t>(sample >> 32), w[3] = stream;
    philox(w, seed, PhiloxScalar{});
  }
};

// A random word as a number in [0, n).
SSLK_TEAM uint32_t below(uint32_t n, uint32_t word) { return static_cast<uint32_t>(uint64_t{word} * n >> 32); }

SSLK_TEAM uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }

SSLK_TEAM uint32_t count_bits(uint32_t x) {
#if defined(__CUDACC__)
  return __popc(x);
#else  // the builtin would call a function where the processor may lack the instruction
  x -= x >> 1 & 0x55555555;
  x = (x & 0x33333333) + (x >> 2 & 0x33333333);
  return ((x + (x >> 4)) & 0x0f0f0f0f) * 0x01010101 >> 24;
#endif
}

// floor(sqrt(n)) for n < 2^30, whatever the rounding of the square root.
SSLK_TEAM uint32_t integer_sqrt(uint32_t n) {
  uint32_t root = static_cast<uint32_t>(sqrtf(static_cast<float>(n)));
  while (root * root > n) root--;
  while ((root + 1) * (root + 1) <= n) root++;
  return root;
}

// ---- the memory of a sample

constexpr SSLK_PHILOX int64_t words_of(int64_t tokens) { return (tokens + 31) / 32; }

constexpr SSLK_PHILOX int64_t power_of_two(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

struct Scratch {
  uint64_t* order;    // room for every token, up to a power of two
  uint32_t* sets[2];  // a bit for every token
  uint32_t* counter;

  static constexpr SSLK_PHILOX int64_t size(int64_t tokens) { return power_of_two(tokens) + words_of(tokens) + 1; }

  SSLK_TEAM Scratch(uint64_t* memory, int64_t tokens) : order(memory) {
    sets[0] = reinterpret_cast<uint32_t*>(order + power_of_two(tokens));
    sets[1] = sets[0] + words_of(tokens);
    counter = sets[1] + words_of(tokens);
  }
};

// ---- sets of tokens

// f(word, bits) for every word that holds some of the tokens [begin, end).
template <class F>
SSLK_TEAM void for_words(uint32_t begin, uint32_t end, const F& f) {
  for (uint32_t at = begin; at < end;) {
    const uint32_t word = at / 32, stop = least(end, 32 * word + 32);
    f(word, ~0u >> (32 - (stop - at)) << at % 32);
    at = stop;
  }
}

struct Rectangle {
  uint32_t top, left, height, width;
};

template <class Team>
SSLK_TEAM void clear(const Team& team, uint32_t* set, uint32_t tokens) {
  team.sync();  // others may still be reading
  for (uint32_t word = team.lane(); word < words_of(tokens); word += team.lanes()) set[word] = 0;
  team.sync();
}

// The members of a set in a rectangle of a grid that has `columns`.
template <class Team>
SSLK_TEAM uint32_t count_in(const Team& team, const uint32_t* set, uint32_t columns, const Rectangle& r) {
  uint32_t count = 0;
  for (uint32_t row = r.top + team.lane(); row < r.top + r.height; row += team.lanes())
    for_words(row * columns + r.left, row * columns + r.left + r.width,
              [&](uint32_t word, uint32_t bits) { count += count_bits(set[word] & bits); });
  return team.sum(count);
}

template <class Team>
SSLK_TEAM void add_rectangle(const Team& team, uint32_t* set, uint32_t columns, const Rectangle& r) {
  team.sync();  // others may still be counting
  for (uint32_t row = r.top + team.lane(); row < r.top + r.height; row += team.lanes())
    for_words(row * columns + r.left, row * columns + r.left + r.width,
              [&](uint32_t word, uint32_t bits) { team.add(set + word, bits); });
  team.sync();
}

template <class Team>
SSLK_TEAM void write_mask(const Team& team, const uint32_t* set, uint32_t tokens, bool* mask) {
  for (uint32_t token = team.lane(); token < tokens; token += team.lanes())
    mask[token] = set[token / 32] >> token % 32 & 1;
}

// ---- choosing tokens by their keys

// Writes key << 32 | token of every member whose key is at most `limit` into `order`, in any order; how many these are.
// members(token) has, in its lowest bits, which of this token (a multiple of 4) and the next three are members.
template <class Team, class Members>
SSLK_TEAM uint32_t keyed(const Team& team, const Draws& draws, uint32_t tokens, const Members& members, uint32_t limit,
                         const Scratch& scratch) {
  if (team.lane() == 0) *scratch.counter = 0;
  team.sync();
  for (uint32_t group = team.lane(); 4 * group < tokens; group += team.lanes()) {
    const uint32_t bits = members(4 * group);
    if (!(bits & 15)) continue;
    uint32_t keys[4];
    draws.words(kKeyDraws | group, keys);
#if defined(__CUDACC__)
#pragma unroll
#endif
    for (uint32_t i = 0; i < 4; i++)
      if ((bits >> i & 1) && 4 * group + i < tokens && keys[i] <= limit)
        scratch.order[team.next(scratch.counter)] = uint64_t{keys[i]} << 32 | (4 * group + i);
  }
  team.sync();
  return *scratch.counter;
}

// Brings the `wanted` of `available` members that have the smallest keys to the front of scratch.order, in any order.
template <class Team, class Members>
SSLK_TEAM void choose(const Team& team, const Draws& draws, uint32_t tokens, const Members& members, uint32_t available,
                      uint32_t wanted, const Scratch& scratch) {
  // keys are spread evenly: those below this limit will almost always do
  const uint32_t enough = wanted + 4 * integer_sqrt(wanted) + 8;
  const uint32_t limit = enough < available ? static_cast<uint32_t>((uint64_t{enough} << 32) / available) : ~0u;
  uint32_t found = keyed(team, draws, tokens, members, limit, scratch);
  if (found < wanted) {
    team.sync();
    found = keyed(team, draws, tokens, members, ~0u, scratch);
  }
  team.smallest(scratch.order, found, wanted);
}

}  // namespace masks
}  // namespace sslkernels
