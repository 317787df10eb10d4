// The mask makers on the CPU: every sample by a team of one lane. No torch.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "../block_mask.h"
#include "../multi_block_mask.h"
#include "../span_mask.h"

namespace sslkernels {
namespace masks {

struct Solo {
  static uint32_t lane() { return 0; }
  static uint32_t lanes() { return 1; }
  static uint32_t sum(uint32_t x) { return x; }
  static void sync() {}
  static void add(uint32_t* word, uint32_t bits) { *word |= bits; }
  static uint32_t next(uint32_t* counter) { return (*counter)++; }
  static void smallest(uint64_t* order, uint32_t n, uint32_t wanted) {
    if (wanted < n) std::nth_element(order, order + wanted, order + n);
  }
  static void sort(uint64_t* order, uint32_t n) { std::sort(order, order + n); }
};

// Which samples there are and what they draw: sample i is number ids[i], or i where there are no ids.
struct Samples {
  int64_t count, tokens;
  uint64_t seed;
  const int64_t* ids;
  uint32_t stream;

  Draws draws(int64_t i) const { return {seed, static_cast<uint64_t>(ids ? ids[i] : i), stream}; }
};

// maker(i, draws, scratch) for every sample. parallel(n, body) runs body(begin, end) over a partition of [0, n).
template <class Parallel, class Maker>
void for_samples(const Samples& samples, const Parallel& parallel, const Maker& maker) {
  parallel(samples.count, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> memory(Scratch::size(samples.tokens));
    const Scratch scratch(memory.data(), samples.tokens);
    for (int64_t i = begin; i < end; i++) maker(i, samples.draws(i), scratch);
  });
}

template <class Parallel>
void make_block_masks(const Samples& samples, const BlockMaskJob& job, const int64_t* wanted, bool* mask,
                      const Parallel& parallel) {
  for_samples(samples, parallel, [&](int64_t i, const Draws& draws, const Scratch& scratch) {
    block_mask(Solo{}, job, draws, static_cast<uint32_t>(wanted[i]), scratch, mask + i * samples.tokens);
  });
}

// The memory of the first sample's row; those of the others follow.
template <class Parallel>
void make_multi_block_masks(const Samples& samples, const MultiBlockJob& job, const MultiBlockRow& first,
                            const Parallel& parallel) {
  for_samples(samples, parallel, [&](int64_t i, const Draws& draws, const Scratch& scratch) {
    multi_block_mask(Solo{}, job, draws, scratch, row_of(job, first, i));
  });
}

// asked: null where the numbers of spans are drawn.
template <class Parallel>
void make_span_masks(const Samples& samples, const SpanMaskJob& job, const int64_t* lengths, const int64_t* asked,
                     bool* mask, const Parallel& parallel) {
  for_samples(samples, parallel, [&](int64_t i, const Draws& draws, const Scratch& scratch) {
    span_mask(Solo{}, job, draws, static_cast<uint32_t>(lengths[i]), asked ? asked[i] : -1, scratch,
              mask + i * samples.tokens);
  });
}

}  // namespace masks
}  // namespace sslkernels
