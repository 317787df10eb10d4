// Philox for vectors of counters.
#pragma once
#include "../philox.h"
#include "vec.h"

namespace sslkernels::SSLK_ISA {

// Two vectors of words, side by side: the rounds of one wait for nothing of the other.
struct WordPair {
  VecWord a, b;
  SSLK_INLINE WordPair operator^(const WordPair& other) const { return {a ^ other.a, b ^ other.b}; }
  SSLK_INLINE WordPair operator^(uint32_t word) const { return {a ^ word, b ^ word}; }
};

struct PhiloxVector {
  static SSLK_INLINE void multiply(VecWord a, uint32_t constant, VecWord& high, VecWord& low) {
    const VecWord odd = (VecWord)((VecLong)a >> 32);
    const VecLong even_product = multiply_wide(a, constant), odd_product = multiply_wide(odd, constant);
    low = even_and_odd((VecWord)even_product, (VecWord)(odd_product << 32));
    high = even_and_odd((VecWord)(even_product >> 32), (VecWord)odd_product);
  }
  SSLK_INLINE void operator()(const WordPair& x, uint32_t constant, WordPair& high, WordPair& low) const {
    multiply(x.a, constant, high.a, low.a);
    multiply(x.b, constant, high.b, low.b);
  }
};

// Stores the four words of each of kLanes counters, counter by counter.
SSLK_INLINE void store_blocks(const VecWord& w0, const VecWord& w1, const VecWord& w2, const VecWord& w3, void* to) {
  SSLK_UNROLL for (int lane = 0; lane < kLanes; lane += 4) {
    const VecWord* words[] = {&w0, &w1, &w2, &w3};
    Quad block[4];
    SSLK_UNROLL for (int w = 0; w < 4; w++) block[w] = *(reinterpret_cast<const Quad*>(words[w]) + lane / 4);
    transpose(block);
    SSLK_UNROLL for (int q = 0; q < 4; q++) * (static_cast<Quad*>(to) + lane + q) = block[q];
  }
}

}  // namespace sslkernels::SSLK_ISA
